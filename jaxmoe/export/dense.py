"""From factored back to dense: the checkpoint that `compress --export dense` would have written."""

from itertools import groupby
from pathlib import Path
from typing import Any

import jaxmoe
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import CODE, layer_index
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.checkpoint.tensor_file import write_tensors
from jaxmoe.checkpoint.workspace import Workspace, finished, layer_file
from jaxmoe.export.checking import check_written, dense_answers, first_and_last, linear_answers
from jaxmoe.export.folder import complete_folder, side_files, write_report


def densify(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a factored checkpoint in the original architecture, layer by layer.

    Args:
        source: a folder or hub id that jaxmoe wrote with factored experts.
        output: the folder to create; it gets its name when it is complete.

    Returns:
        `{"output", "stored": {"parameters", "bytes"}, "notes", "run", "seal"}`, also written to `report.json`; the
        notes say how the source was read.

    Raises:
        JaxmoeError: the source is not factored or damaged, or the output exists.
    """
    opened = CompressedCheckpoint.open(source)
    opened.check_dense()
    output = output_folder(output, [opened.folder])
    run = {"convert": "dense", "source": opened.fingerprint(), "jaxmoe": jaxmoe.__version__}
    if (done := finished(output, run)) is not None:
        return done
    workspace = Workspace(output, run)
    files: list[Path] = []
    meant: dict[int, dict[str, list[float]]] = {}
    # Nothing is gone on with: reading and writing again is all there is to it.
    with workspace.opened([], resume=False), workspace.exclusive("convert"):
        for index, modules in groupby(sorted((*opened.modules, *opened.linears), key=layer_index), layer_index):
            files.append(workspace.folder / layer_file(index))
            write_tensors(files[-1], [tensor for module in modules for tensor in opened.dense_tensors(module)])
        for module in opened.modules:
            if (index := layer_index(module)) in first_and_last(map(layer_index, opened.modules)):
                layer = opened.layer(module)
                meant[index] = dict(dense_answers(layer.materialize, layer.sizes))
        for module, record in opened.linears.items():
            if (index := layer_index(module)) in first_and_last(map(layer_index, opened.linears)):
                meant.setdefault(index, {})[record.layout.name] = linear_answers(opened.linear(module))
        stored = complete_folder(
            workspace.folder,
            layers=files,
            copied=opened.decoded(),
            config=opened.dense_config(),
            code={},
            beside={name: path for name, path in side_files(opened.folder).items() if name not in CODE},
        )
        check_written(workspace.folder, opened, meant)
        report = {"output": str(output), "stored": stored, "notes": list(opened.notes), "run": run}
        report = write_report(workspace.folder, report)
        workspace.publish()
    return report
