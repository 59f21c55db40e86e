"""A checkpoint's config, read with account: what is neither used nor known to be harmless is an error."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from jaxmoe.checkpoint.families.parts.harmless import HARMLESS, NEUTRAL
from jaxmoe.checkpoint.families.parts.keys import FALSE_FOR_NONE, KINDS, Kind, brief, check_kinds
from jaxmoe.errors import JaxmoeError

_REQUIRED = object()


class Settings:
    """A decoder's config that remembers what was read.

    Args:
        config: the part of `config.json` that describes the decoder; all values are checked here (`keys.py`).
        defaults: what the architecture means by keys that are not there.
        ignored: keys that nobody knows and the user says to leave out of account.
        kinds: what may stand under each key.
        harmless: keys that change nothing, beside those of `HARMLESS`.
        neutral: keys that change nothing with some values.

    Raises:
        JaxmoeError: values are of the wrong kind, or what is to be ignored is in use.

    Example:
        >>> settings = Settings({"hidden_size": 8, "new_trick": True}, {"vocab_size": 32})
        >>> settings.take("hidden_size"), settings.take("vocab_size")
        (8, 32)
        >>> settings.finish()
        Traceback (most recent call last):
            ...
        jaxmoe.errors.JaxmoeError: config.json: jaxmoe does not know what new_trick (True) does to the model, ...
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        ignored: Collection[str] = (),
        *,
        kinds: Mapping[str, Kind] = KINDS,
        harmless: Collection[str] = (),
        neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
    ):
        check_kinds(config, kinds)
        self.config = {k: None if v is False and k in FALSE_FOR_NONE else v for k, v in config.items()}
        self.defaults = defaults
        self.ignored = frozenset(ignored)
        self.harmless = HARMLESS.union(harmless)
        self.neutral = neutral
        self.read: set[str] = set()

    def take(self, names: str, null: Any = _REQUIRED) -> Any:
        """Return the value of a key that goes by several names `a|b`, else the architecture's default.

        Args:
            names: of one thing.
            null: what it means that the config says null, and that it says nothing where the architecture has no
                default; without it null is as nothing.

        Raises:
            JaxmoeError: the names say different things, or there is neither a value nor a default.
        """
        keys = names.split("|")
        self.read.update(keys)
        given = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        if given:
            first, *others = given.values()
            if not all(_same(first, other) for other in others):
                listed = " and ".join(f"{key} = {brief(value)}" for key, value in given.items())
                raise JaxmoeError(f"config.json: {listed} are two names of one thing: keep the one that is true")
            return first
        if null is not _REQUIRED and any(key in self.config for key in keys):
            return null
        for key in keys:
            if key in self.defaults:
                return self.defaults[key]
        if null is _REQUIRED:
            raise JaxmoeError(
                f"config.json says nothing of {names.replace('|', ' or ')}: add it as the model's authors set it"
            )
        return null

    def of_layer(self, names: str, index: int, null: Any = _REQUIRED) -> Any:
        """Return what `take` does, of one layer where the config has a list with an entry for each.

        Raises:
            JaxmoeError: as `take`, or the list is not as long as the model is deep.
        """
        value = self.take(names, null)
        if not isinstance(value, list):
            return value
        depth = self.take("num_hidden_layers")
        if len(value) != depth:
            raise JaxmoeError(
                f"config.json: {names.replace('|', ' or ')} has {len(value)} entries, and there are {depth} layers"
            )
        return value[index]

    def derive(self, name: str, value: Any) -> None:
        """Fill in what follows from other keys, where the config says nothing or null."""
        if self.config.get(name) is None:
            self.config[name] = value

    def expect(self, name: str, *values: Any) -> None:
        """Accept an attribute, absent or with one of the values that change nothing; raise for any other one."""
        self.read.add(name)
        value = self.config.get(name)
        if value is not None and value not in values:
            raise JaxmoeError(f"config.json: {name} = {brief(value)} is not something that jaxmoe computes")

    def finish(self) -> None:
        """Raise if there is an attribute that was not read and is not known to be harmless; all are listed."""
        if used := sorted(self.ignored & self.read & self.config.keys()):
            raise JaxmoeError(
                f"--ignore-config-keys {','.join(used)}: jaxmoe knows what this means and computes with it; change it"
                " in config.json if it is wrong"
            )
        left = {
            name: value
            for name, value in self.config.items()
            if name not in self.read | self.harmless | self.ignored
            and value not in (None, *self.neutral.get(name, (False, {}, [])))
        }
        if left:
            listed = ", ".join(f"{name} ({brief(value)})" for name, value in sorted(left.items()))
            raise JaxmoeError(
                f"config.json: jaxmoe does not know what {listed} does to the model, and computes nothing that it is"
                " not sure of. If it changes nothing, say so: --ignore-config-keys"
                f" {','.join(sorted(left))} (ignore_config_keys= in Python). Else statistics can be gathered through"
                " PyTorch instead (`jaxmoe.torch.statistics`)"
            )


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values say the same: also one number beside a list that has it for every layer."""
    if isinstance(one, list) != isinstance(other, list):
        one, other = (value if isinstance(value, list) else [value] for value in (one, other))
        return bool(one) and bool(other) and {*one} == {*other}
    return one == other
