"""Write notebooks/*.ipynb anew from notebooks/*.py, with their outputs: python scripts/notebooks.py [NUMBER ...]

Only what a reader should see is kept: no times, no messages on standard error, and cells are named by their places, so
that the same outputs are the same file.
"""

import sys
from pathlib import Path

import jupytext  # pyright: ignore[reportMissingImports]
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parents[1] / "notebooks"


def main(numbers: list[str]) -> None:
    for script in sorted(FOLDER.glob("*.py")):
        if numbers and script.name[0] not in numbers:
            continue
        notebook = jupytext.read(script)
        # As JSON has it; the executed notebook is read by programs that know nothing of jupytext.
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        NotebookClient(notebook, record_timing=False, timeout=600).execute()
        for place, cell in enumerate(notebook.cells):
            cell.id = f"cell-{place}"
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        jupytext.write(notebook, script.with_suffix(".ipynb"))
        print(script.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
