"""`jaxmoe recover` from the command line: what is written, what is left alone, kills, and bad input."""

import json
import shutil
import signal
import subprocess
import time
from datetime import datetime
from importlib import import_module

import numpy as np
import pytest
from program import ENVIRONMENT, call, checksums, command
from two_layers import short_demo

from jaxmoe.checkpoint import files
from jaxmoe.checkpoint.stored_model import StoredModel
from jaxmoe.data import demo_texts
from jaxmoe.recovery.trainable import merge, names

TRAINING = ("--steps", 4, "--rows", 2, "--length", 32, "--learning-rate", 0.01, "--save-every", 1, "--warmup", 0.5)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed") / "small"
    done = call("compress", short_demo(), output, "--method", "svd", "--ratio", 0.8)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def text():
    return demo_texts()[0]


@pytest.fixture(scope="module")
def recovered(compressed, text):
    """An undisturbed run, its command, and its report."""
    output = compressed.with_name("recovered")
    arguments = ("--teacher", short_demo(), "--text", text, "--train", "factors,router", *TRAINING)
    done = call("recover", compressed, output, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return output, arguments, json.loads(done.stdout)


def tensors(folder):
    return {name: np.array(entry.read()) for name, entry in files.read_tensors(folder).items()}


def test_what_is_trained_changes_and_nothing_else(compressed, recovered):
    output, _, report = recovered
    before, after = tensors(compressed), tensors(output)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed
    assert all(".mlp.gate." in name or ".mlp.experts." in name for name in changed)
    assert any(".mlp.gate." in name for name in changed)
    assert report["trained"]["parameters"] == sum(before[name].size for name in changed if "ranks" not in name)
    assert report["stored"]["parameters"] == sum(array.size for array in before.values())
    for name in ("config.json", "modeling_jaxmoe.py", "tokenizer.json"):
        assert (output / name).read_bytes() == (compressed / name).read_bytes()


def test_the_report_says_what_happened(compressed, recovered):
    output, _, report = recovered
    assert json.loads((output / "report.json").read_text()) == report
    assert report["compression"] == json.loads((compressed / "report.json").read_text())
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["loss"] == metrics[-1]["distillation"] == report["losses"]["loss"]["last_tenth"]
    assert not (output / ".jaxmoe").exists()
    card = (output / "README.md").read_text()
    assert "## Recovery" in card
    assert "Compressed with jaxmoe: svd" in card


def test_the_result_runs_in_pytorch_and_is_closer_to_the_original(compressed, recovered, text):
    pytest.importorskip("torch")
    from jaxmoe.evaluation import evaluate
    from jaxmoe.torch.perplexity import perplexity

    options = {"length": 32, "sequences": 8, "generate": 0}
    before, after = (evaluate(x, text=text, **options) for x in (compressed, recovered[0]))
    assert after.geometric_mean_perplexity < before.geometric_mean_perplexity
    theirs = perplexity(recovered[0], [text], length=32, windows=8)
    assert after.geometric_mean_perplexity == pytest.approx(theirs.geometric_mean_perplexity, rel=1e-4)


def test_the_same_command_finds_the_result(compressed, recovered):
    output, arguments, report = recovered
    again = call("recover", compressed, output, *arguments, "--json")
    assert json.loads(again.stdout) == report
    other = call("recover", compressed, output, *arguments, "--seed", 1)
    assert other.returncode == 1
    assert "exists and holds something else" in other.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(compressed, recovered, tmp_path):
    output, arguments, _ = recovered
    killed = tmp_path / "killed"
    states = tmp_path / "killed.partial" / ".jaxmoe" / "training" / "states"
    process = subprocess.Popen(command("recover", compressed, killed, *arguments), env=ENVIRONMENT)
    # As soon as the second state is there: some steps are to come, and perhaps a state is half written.
    while process.poll() is None and not (states / "2").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    other = call("recover", compressed, killed, *arguments, "--seed", 1)
    assert other.returncode == 1
    assert "was begun with other settings: seed" in other.stderr
    done = call("recover", compressed, killed, *arguments)
    assert done.returncode == 0, done.stderr
    assert "step 1 of 4" not in done.stderr
    assert checksums(killed) == checksums(output)


def test_a_damaged_state_costs_the_steps_since_the_one_before(compressed, recovered, tmp_path):
    output, arguments, _ = recovered
    process = subprocess.Popen(
        command("recover", compressed, tmp_path / "out", *arguments, "--json"),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if json.loads(line).get("done") == 3:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    other = call("recover", compressed, tmp_path / "out", *arguments, "--seed", 1)
    assert other.returncode == 1
    assert "was begun with other settings: seed" in other.stderr
    training = tmp_path / "out.partial" / ".jaxmoe" / "training"
    last = max(int(path.stem) for path in (training / "states").glob("*.json"))
    damaged = next(path for path in sorted((training / "states" / str(last)).rglob("*")) if path.is_file())
    damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    done = call("recover", compressed, tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{damaged}: not what was written, the state cannot be used: going on from step {last - 1}" in done.stderr
    assert "step 1 of 4" not in done.stderr
    assert checksums(tmp_path / "out") == checksums(output)
    outcomes = json.loads((tmp_path / "out" / "report.json").read_text())["outcomes"]
    # Of four steps on other rows each, the last need not lose less than the first.
    (outcome,) = (own for own in outcomes if own["kind"] != "no_gain")
    assert outcome["kind"] == "damaged_state"
    assert str(damaged) in outcome["detail"]


def test_a_loss_that_does_not_fall_is_told(compressed, text, tmp_path):
    options = list(TRAINING)
    options[options.index("--learning-rate") + 1] = 1
    done = call("recover", compressed, tmp_path / "out", "--text", text, "--train", "norms", *options)
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads((tmp_path / "out" / "report.json").read_text())["outcomes"]
    assert outcome["kind"] == "no_gain"
    assert "at another learning rate than 1" in outcome["detail"]
    assert "the loss did not fall" in done.stdout.replace("\n", " ")
    assert outcome["detail"] in (tmp_path / "out" / "README.md").read_text()


def test_training_that_diverges_says_so_and_keeps_the_last_state(compressed, text, tmp_path):
    options = list(TRAINING)
    options[options.index("--learning-rate") + 1] = 1e12
    done = call("recover", compressed, tmp_path / "out", "--text", text, "--train", "all", *options)
    assert done.returncode == 1
    assert "not finite, training diverged; the state of step" in done.stderr
    assert "smaller --learning-rate" in done.stderr
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / ".jaxmoe" / "training" / "states").iterdir())


def test_dialogues_are_learned_from(text, tmp_path):
    talk = tmp_path / "talk.jsonl"
    lines = [{"prompt": f"Say {word}.", "response": f"{word} it is, and nothing else."} for word in "abcdefgh"]
    talk.write_text("\n".join(json.dumps(line) for line in lines))
    options = ("--train", "router", "--loss", "next_token,balance=0.01", *TRAINING, "--json")
    learned = []
    for name, extra in (("answers", ()), ("all", ("--prompts",))):
        done = call("recover", short_demo(), tmp_path / name, "--instructions", talk, *extra, *options)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert set(report["losses"]) == {"loss", "next_token", "balance"}
        learned.append(report["data"]["learned"])
    assert 0 < learned[0] < learned[1]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A checkpoint of another vocabulary, with the bundled one's tokenizer."""
    pytest.importorskip("torch")
    import tiny_models

    folder = tmp_path_factory.mktemp("stranger") / "model"
    tiny_models.save_tiny("qwen3_moe", folder, vocab_size=4160)
    shutil.copy(short_demo() / "tokenizer.json", folder)
    return folder


def test_a_run_goes_on_with_the_date_of_its_beginning(tmp_path, monkeypatch):
    module = import_module("jaxmoe.recovery.recover")

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, 3, 4, 5, 6)

    source = shutil.copytree(short_demo(), tmp_path / "model")
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (source / "chat_template.jinja").write_text(template)
    output, begun = tmp_path / "out", tmp_path / "out.partial" / ".jaxmoe" / "run.json"
    monkeypatch.setattr(module, "datetime", Later)
    assert module._clock(source, output) == datetime(2026, 1, 2, 3, 4, 5)
    begun.parent.mkdir(parents=True)
    for content, expected in (
        ('{"clock": "2025-12-31T23:59:00"}', (2025, 12, 31, 23, 59)),
        ("{}", (2026, 1, 2, 3, 4, 5)),
    ):
        begun.write_text(content)
        assert module._clock(source, output) == datetime(*expected)
    output.mkdir()
    (output / "report.json").write_text('{"run": {"clock": "2024-02-29T00:00:00"}}')
    assert module._clock(source, output) == datetime(2024, 2, 29)
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"prompt": "a", "response": "b"}))
    tokenizer = module.Tokenizer.open(source)
    (document,) = module.documents(source, tokenizer, [], [talk], clock=datetime(2024, 2, 29))
    assert tokenizer.decode(document.ids) == "2024-02-29ab"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    assert module._clock(source, output) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0, "--text", "TEXT"), "steps 0: give at least 1"),
        ((), "no text: give at least one text file"),
        (("--text", "TEXT", "--train", "expert_vectors"), "the model has none; it has"),
        (
            ("--text", "TEXT", "--train", "everything"),
            "give some of router, factors, scales, norms, expert_vectors, all",
        ),
        (("--text", "TEXT", "--loss", "distillation"), "the loss distillation needs a teacher"),
        (("--text", "TEXT", "--loss", "next_token=x"), "'x' is no number"),
        (("--text", "TEXT", "--loss", "guess"), "give some of next_token"),
        (("--text", "TEXT", "--teacher", "STRANGER"), "has 4160 tokens"),
        (("--text", "TEXT", "--teacher", "TEXT"), "code.txt"),
        (("--text", "TEXT", "--loss", "next_token", "--teacher", "STRANGER"), "no loss that needs one"),
        (("--text", "TEXT", "--mesh", "2"), "give DATAxEXPERT"),
        (("--text", "TEXT", "--mesh", "4x4"), "there are 1"),
        (("--text", "TEXT", "--accumulate", 3), "cannot be cut into 3 equal parts"),
        (("--text", "TEXT", "--length", 1), "length of at least 2"),
        (("--instructions", "none.jsonl"), "does not exist"),
    ],
)
def test_bad_input(arguments, message, text, stranger, tmp_path, capsys):
    from jaxmoe.cli import main

    given = [{"TEXT": str(text), "STRANGER": str(stranger)}.get(str(part), str(part)) for part in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["jaxmoe", "recover", str(short_demo()), str(tmp_path / "out"), *given])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_every_array_is_written_where_it_is_read(family, tmp_path):
    pytest.importorskip("torch")
    import tiny_models

    from jaxmoe.export.trained import write_trained

    tiny_models.save_tiny(family, tmp_path / "source")
    model = StoredModel(tmp_path / "source")
    parameters = model.parameters()
    generator = np.random.default_rng(0)
    changed = {}
    for name, array in zip(names(parameters), _leaves(parameters)):
        changed[name] = generator.standard_normal(array.shape).astype(array.dtype)
    (tmp_path / "out").mkdir()
    write_trained(model, merge(parameters, changed), list(changed), tmp_path / "out")
    read = StoredModel(tmp_path / "out").parameters()
    assert names(read) == list(changed)
    for name, array in zip(names(read), _leaves(read)):
        np.testing.assert_array_equal(array, changed[name], err_msg=name)


@pytest.mark.parametrize("name", ["layers.0.router.weight", "layers.0.experts.terms.up.0.weight"])
def test_numbers_that_the_files_cannot_hold_are_refused(name, tmp_path):
    from jaxmoe.errors import JaxmoeError
    from jaxmoe.export.trained import write_trained

    model = StoredModel(short_demo())
    parameters = model.parameters()
    array = dict(zip(names(parameters), _leaves(parameters)))[name]
    with pytest.raises(JaxmoeError, match="bfloat16 cannot hold"):
        write_trained(model, merge(parameters, {name: np.full(array.shape, 3.4e38, np.float32)}), [name], tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
