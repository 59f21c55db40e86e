"""Statistics folders: written in steps, resumed, read merged, and refused where they do not fit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from random_statistics import RECORD, records

from jaxmoe.calibration.folder import Statistics, layer_path
from jaxmoe.calibration.statistics import FIELDS
from jaxmoe.calibration.writer import StatisticsWriter, save
from jaxmoe.checkpoint import Checkpoint, Planned, read_header, write_tensors
from jaxmoe.data import demo_checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.texts import tokenizer_fingerprint


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "statistics", RECORD, records())
    return tmp_path / "statistics"


def test_round_trip(folder):
    opened = Statistics.open(folder).check()
    assert opened.record == RECORD
    assert (opened.domains, opened.layers) == (("code", "web"), (1, 4))
    for domain, layers in records().items():
        for index, expected in layers.items():
            found = opened.layer(index, [domain])
            assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
            assert found.arrays().keys() == expected.arrays().keys()
            for name, array in expected.arrays().items():
                assert np.array_equal(found.arrays()[name], array.astype(FIELDS[name].stored)), name


def test_domains_are_merged(folder):
    opened, expected = Statistics.open(folder), records()
    total = expected["code"][1] + expected["web"][1]
    found = opened.layer(1)
    assert (found.tokens, found.sequences) == (16, 6)
    for name, array in total.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, rtol=1e-7)
        np.testing.assert_array_equal(opened.read(1, name, experts=slice(1, 3)), found.arrays()[name][1:3])


def test_files_hold_what_is_promised(folder):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(folder / "code" / "layer00001.safetensors")
    assert {name: str(array.dtype) for name, array in tensors.items()} == {n: f.stored for n, f in FIELDS.items()}
    said = json.loads((folder / "statistics.json").read_text())
    assert said["schema"] == 1
    assert said["ties"] == "lowest index first"
    assert said["domains"]["web"] == [{"fingerprint": "b", "sequences": 4, "length": 256, "tokens": 9}]
    assert said["layers"]["4"] == {"experts": 2, "hidden": 4, "intermediate": 6, "gated": True}
    assert not (folder / ".jaxmoe").exists()


def test_resumes_where_it_stopped(tmp_path):
    wanted = records()
    first = StatisticsWriter(tmp_path / "s", RECORD)
    with first.opened():
        for domain, index in (("code", 1), ("web", 1), ("code", 4)):
            first.write(domain, index, wanted[domain][index])
    with pytest.raises(JaxmoeError, match="is not finished"):
        Statistics.open(tmp_path / "s")
    # Two accidents: one file is cut, one was never journaled.
    partial = tmp_path / "s.partial"
    cut = partial / layer_path("web", 1)
    cut.write_bytes(cut.read_bytes()[:-1])
    second = StatisticsWriter(tmp_path / "s", RECORD)
    with second.opened():
        assert second.missing() == [("web", 1), ("web", 4)]
        with pytest.raises(JaxmoeError, match="2 records are missing"):
            second.publish()
        for domain, index in second.missing():
            second.write(domain, index, wanted[domain][index])
        second.publish()
    save(tmp_path / "once", RECORD, wanted)
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "once")).read_bytes()
    assert not partial.exists()


def test_other_settings_are_refused(tmp_path):
    with StatisticsWriter(tmp_path / "s", RECORD).opened():
        pass
    other = dataclasses.replace(RECORD, gradients=None)
    said = r"begun with other settings: gradients \(was 'sequence', now None\)"
    with pytest.raises(JaxmoeError, match=said), StatisticsWriter(tmp_path / "s", other).opened():
        pass
    with StatisticsWriter(tmp_path / "s", other).opened(resume=False):
        pass


def test_one_process_at_a_time(tmp_path):
    first, second = StatisticsWriter(tmp_path / "s", RECORD), StatisticsWriter(tmp_path / "s", RECORD)
    said = "another run is working on calibration"
    with first.opened(), pytest.raises(JaxmoeError, match=said), second.opened():
        pass


def test_finished_runs_are_recognised(folder, tmp_path):
    assert StatisticsWriter(folder, RECORD).finished().domains == ("code", "web")
    assert StatisticsWriter(tmp_path / "new", RECORD).finished() is None
    with pytest.raises(JaxmoeError, match="exists"):
        StatisticsWriter(folder, dataclasses.replace(RECORD, model="other")).finished()
    with pytest.raises(JaxmoeError, match="exists"), StatisticsWriter(folder, RECORD).opened():
        pass


def test_sums_that_do_not_fit_are_refused(tmp_path):
    writer, wanted = StatisticsWriter(tmp_path / "s", RECORD), records()
    with writer.opened():
        with pytest.raises(JaxmoeError, match=r"layer 1 of web .*tokens 7, not 9; sequences 2, not 4"):
            writer.write("web", 1, wanted["code"][1])
        with pytest.raises(JaxmoeError, match=r"layer 4 of code .*shape"):
            writer.write("code", 4, wanted["code"][1])


@pytest.mark.parametrize(("name", "value"), [("output_sums", np.nan), ("input_moments", np.inf), ("fisher_up", 1e39)])
def test_overflow_names_layer_and_expert(tmp_path, name, value):
    writer, wanted = StatisticsWriter(tmp_path / "s", RECORD), records()["code"][1]
    getattr(wanted, name)[3, 0] = value
    with writer.opened():
        with pytest.raises(JaxmoeError, match=f"infinite {name} in layer 1, expert 3 on code"):
            writer.write("code", 1, wanted)
        assert len(writer.missing()) == 4


def test_unknown_layers_and_domains(folder):
    opened = Statistics.open(folder)
    with pytest.raises(JaxmoeError, match=r"no domain news, sport: the domains there are code, web"):
        opened.layer(1, ["news", "code", "sport"])
    with pytest.raises(JaxmoeError, match=r"no layer 2: .*it has 1, 4"):
        opened.layer(2)
    with pytest.raises(JaxmoeError, match="no domain chosen"):
        opened.check(domains=[])
    with pytest.raises(JaxmoeError, match=r"no layer 7, 8"):
        opened.check(layers=[1, 7, 8])


def test_what_was_not_kept_is_said(tmp_path):
    record = dataclasses.replace(RECORD, moments="pooled", gradients=None)
    opened = save(tmp_path / "s", record, records(record))
    assert opened.layer(1).input_moments is None
    with pytest.raises(JaxmoeError, match="did not keep input_moments of layer 1"):
        opened.read(1, "input_moments")


@pytest.mark.parametrize("spoil", ["cut", "missing", "other"])
def test_all_damaged_files_are_listed(folder, spoil):
    paths = [folder / layer_path("code", 1), folder / layer_path("web", 4)]
    for path in paths:
        if spoil == "cut":
            path.write_bytes(path.read_bytes()[:-8])
        elif spoil == "missing":
            path.unlink()
        else:
            shutil.copyfile(folder / layer_path("web", 1 if "00004" in path.name else 4), path)
    with pytest.raises(JaxmoeError) as raised:
        Statistics.open(folder).check()
    assert all(str(path) in str(raised.value) for path in paths)


def test_newer_schema_and_damaged_json(folder):
    path = folder / "statistics.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 3, "jaxmoe": "9.0"}))
    with pytest.raises(JaxmoeError, match=r"schema 3, .*reads up to 2: upgrade jaxmoe.*9\.0"):
        Statistics.open(folder)
    for damaged in (b"{", b"\xff", b"", b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(JaxmoeError, match=r"statistics\.json (is not JSON|does not hold) .*: calibrate again"):
            Statistics.open(folder)


def without(key):
    return lambda content: content.pop(key)


def put(*path, value):
    """Return a change that puts a value at a place of the record."""

    def change(content):
        *way, last = path
        for key in way:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without(key) for key in ("schema", "jaxmoe", "model", "tokenizer", "ties", "moments", "gradients")),
        *(without(key) for key in ("domains", "layers")),
        put("surprise", value=1),
        put("ties", value="highest index first"),
        *(put("schema", value=value) for value in (None, -1, 0, "1", True, 1.5, [])),
        *(put("model", value=value) for value in (None, 3)),
        *(put("moments", value=value) for value in (None, "all", 3)),
        *(put("gradients", value=value) for value in ("all", 3)),
        *(put("domains", value=value) for value in (None, {}, [], "code", {"code": None}, {"code": []}, {"code": {}})),
        *(put("domains", name, value=[]) for name in ("", ".", "..", "a\0", "x" * 300, "a\nb")),
        *(
            put("domains", "code", 0, key, value=v)
            for key in ("sequences", "tokens")
            for v in (None, -1, 2**63, "3", 0.5)
        ),
        put("domains", "code", 0, value=None),
        *(put("layers", value=value) for value in (None, {}, [], {"x": None}, {"-1": {}}, {"1": {"experts": 2}})),
        *(put("layers", "1", "experts", value=value) for value in (None, 0, -3, 2**31, 2**63, "5", 5.0, [5])),
    ],
)
def test_edited_records(folder, change):
    path = folder / "statistics.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(JaxmoeError, match=r"statistics\.json.*: ?.*calibrate again"):
        Statistics.open(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("counts", -1), ("input_moments", np.nan), ("output_sums", np.inf), ("fisher_up", -1.0), ("channel_peaks", -1.0)],
)
def test_sums_that_cannot_be(folder, name, value):
    path = folder / layer_path("code", 1)
    arrays = {key: entry.read() for key, entry in read_header(path).items()}
    wrong = arrays[name].copy()
    wrong.flat[0] = value
    arrays[name] = wrong
    planned = [Planned(key, array.dtype, array.shape, lambda array=array: array) for key, array in arrays.items()]
    write_tensors(path, planned)
    with pytest.raises(JaxmoeError, match=rf"layer00001\.safetensors: {name} holds what no sum"):
        Statistics.open(folder).layer(1)


def test_no_statistics_there(tmp_path):
    with pytest.raises(JaxmoeError, match=r"has no statistics\.json"):
        Statistics.open(tmp_path)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture
def fitting(checkpoint):
    return dataclasses.replace(
        RECORD,
        model=checkpoint.fingerprint(),
        tokenizer=tokenizer_fingerprint(checkpoint.folder),
        layers={layer.index: layer.shape for layer in checkpoint.layers},
        moments="none",
        gradients=None,
    )


def test_fits_its_checkpoint(tmp_path, checkpoint, fitting):
    opened = save(tmp_path / "s", fitting, records(fitting))
    assert opened.check(checkpoint) is opened
    unknown = dataclasses.replace(fitting, tokenizer=None)
    save(tmp_path / "u", unknown, records(unknown)).check(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"), [({"model": "x"}, "of another model"), ({"tokenizer": "x"}, "another tokenizer")]
)
def test_of_another_model_or_tokenizer(tmp_path, checkpoint, fitting, change, said):
    other = dataclasses.replace(fitting, **change)
    with pytest.raises(JaxmoeError, match=said):
        save(tmp_path / "s", other, records(other)).check(checkpoint)


def test_layers_that_the_checkpoint_needs(tmp_path, checkpoint, fitting):
    some = dataclasses.replace(fitting, layers=dict(list(fitting.layers.items())[1:]))
    opened = save(tmp_path / "s", some, records(some))
    first, *rest = fitting.layers
    with pytest.raises(JaxmoeError, match=f"no layer {first}"):
        opened.check(checkpoint)
    opened.check(checkpoint, layers=rest)
