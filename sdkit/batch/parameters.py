"""What a notebook takes: its annotated parameters, against which every value is checked first.

papermill only warns of a parameter that it does not know, runs the notebook without it and exits
with 0; of types it knows nothing. Its own reader of the parameters cell goes by a regular
expression that misses `str | None` and values with an equals sign, so the cell is parsed here.
"""

import ast
import contextlib
import difflib
from dataclasses import dataclass, fields

import nbformat

from sdkit.validation import ValidationError

OUTPUT_NAME = "output_folder"  # where a notebook writes: a sweep decides that
MISSING = object()
TYPES = {
    "str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict,
    "tuple": list, "None": type(None),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell.

    Attributes:
        name: Its name.
        annotation: Its type as it is written, as "str | None"; or None.
        default: Its value, where that is a literal.
    """

    name: str
    annotation: str | None
    default: object = MISSING


def read_notebook(path):
    """Reads a notebook that can be swept over: Python, with a cell tagged `parameters`.

    Returns:
        The nbformat notebook.

    Raises:
        ValidationError: It is not there, no notebook, not in Python, or has no such cell.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except OSError as error:
        raise ValidationError(f"{path}: no such notebook ({error.strerror}).") from error
    except Exception as error:  # nbformat and json have a dozen for a file that is none
        raise ValidationError(
            f"{path}: not a Jupyter notebook ({type(error).__name__})."
        ) from error
    language = notebook.metadata.get("kernelspec", {}).get("language") or notebook.metadata.get(
        "language_info", {}
    ).get("name", "python")
    if language != "python":
        raise ValidationError(f"{path}: a notebook in {language}, expected one in Python.")
    if _find_parameters_cell(notebook) is None:
        raise ValidationError(
            f"{path}: no code cell is tagged `parameters`, so nothing could be passed. Tag the "
            "cell that sets them (JupyterLab: property inspector, Cell Tags)."
        )
    return notebook


def read_parameters(notebook, name):
    """Returns {name: Parameter} of a notebook's parameters cell.

    Raises:
        ValidationError: The cell is no Python, or sets nothing.
    """
    try:
        body = ast.parse(_find_parameters_cell(notebook).source).body
    except SyntaxError as error:
        raise ValidationError(
            f"{name}: the parameters cell is no Python (line {error.lineno}: {error.msg})."
        ) from error
    found = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            targets, annotation = [line.target], ast.unparse(line.annotation).strip("'\"")
        elif isinstance(line, ast.Assign):
            targets, annotation = [t for t in line.targets if isinstance(t, ast.Name)], None
        else:
            continue
        default = MISSING
        with contextlib.suppress(ValueError):
            default = ast.literal_eval(line.value)
        for target in targets:
            found[target.id] = Parameter(target.id, annotation, default)
    if not found:
        raise ValidationError(f"{name}: the parameters cell sets nothing. Expected `name = value`.")
    return found


def check_run_values(values, parameters, grid):
    """Returns a run's values as the notebook will get them: 2 for a float becomes 2.0.

    Args:
        values: {name: value} of one run.
        parameters: What `read_parameters` returned.
        grid: The Grid, for messages.

    Raises:
        ValidationError: A name or a type that the notebook does not have.
    """
    checked = {}
    for name, value in values.items():
        if name == OUTPUT_NAME:
            raise ValidationError(f"{grid.where(name)}: {name} is set for each run by the sweep.")
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            raise ValidationError(
                f"{grid.where(name)}: {name!r} is no parameter of the notebook. "
                + (f"Did you mean {close[0]}? " if close else "")
                + f"It has {', '.join(parameters)}."
            )
        if not is_plain(value):
            raise ValidationError(
                f"{grid.where(name)}: {name} is {value!r:.80} ({type(value).__name__}), expected "
                "numbers, text, true, false, null, and lists and maps (with text as keys) of them."
            )
        parameter = parameters[name]
        annotation = parameter.annotation or _name_type(parameter.default)
        tree = _parse_annotation(annotation)
        if tree is not None and not _fits(value, tree):
            raise ValidationError(
                f"{grid.where(name)}: {name} is {value!r} ({type(value).__name__}), expected "
                f"{annotation}, as the notebook has it."
            )
        is_float = tree is not None and not _fits(value, tree, widen=False)
        checked[name] = float(value) if is_float and type(value) is int else value
    return checked


def is_plain(value):
    """Whether a value is JSON's: papermill hands on a set or a tuple as text, a key as text too."""
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def check_loadable(runs, grid, folder, *, here=True):
    """Asks the loader's own checks about the values that it would refuse when the run is going.

    Args:
        runs: The values of each run.
        grid: The Grid, for messages.
        folder: The notebook's, where its relative paths start.
        here: Whether the runs are for this machine, so that devices and folders can be looked at.

    Raises:
        ValidationError: A dtype, backend, attention or model that `load_pipeline` refuses.
    """
    for name in ("dtype", "attention", "backend", "model"):
        asked = []
        for run in runs:
            if name in run and run[name] not in asked:
                asked.append(run[name])
        for value in asked:
            try:
                with contextlib.chdir(folder):
                    _check_as_loader(name, value, here)
            except ValidationError as error:
                raise ValidationError(f"{grid.where(name)}: {error}") from error


def check_trainable(notebook, runs, grid):
    """Asks the training's own checks about the settings of a notebook that trains with them.

    A notebook that imports LoRAConfig is taken to mean by a parameter what a setting of that name
    means.

    Args:
        notebook: The nbformat notebook.
        runs: All parameters of each run, with the values that they will have.
        grid: The Grid, for messages.

    Raises:
        ValidationError: A setting that `LoRAConfig` refuses, such as a rank of 0.
    """
    if not any("LoRAConfig" in cell.source for cell in notebook.cells if cell.cell_type == "code"):
        return
    from sdkit.finetuning.config import LoRAConfig

    known = {setting.name for setting in fields(LoRAConfig)} - {OUTPUT_NAME}
    for run in runs:
        try:
            LoRAConfig(**{name: value for name, value in run.items() if name in known})
        except ValidationError as error:
            at_fault = str(error).partition("=")[0]
            raise ValidationError(f"{grid.where(at_fault)}: {error}") from error


def _check_as_loader(name, value, here):
    # Imported only where a grid names one of them: they bring torch.
    if name == "dtype":
        from sdkit.loading.dtype_policy import check_dtype

        check_dtype(value)
    elif name == "attention":
        from sdkit.loading.pipeline import check_attention

        check_attention(value)
    elif name == "backend" and here:
        from sdkit.device import choose_device

        choose_device(value)
    elif name == "model" and here:
        from sdkit.loading.checkpoint import find_checkpoint

        find_checkpoint(value)


def _find_parameters_cell(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            return cell
    return None


def _name_type(default):
    """The type that a default without annotation shows; None where it shows none."""
    if default is MISSING or default is None:
        return None
    return next((name for name, kind in TYPES.items() if type(default) is kind), None)


def _parse_annotation(annotation):
    """The tree of an annotation; None where there is none, or where it is words and no Python."""
    with contextlib.suppress(SyntaxError):
        return ast.parse(annotation or "", mode="eval").body
    return None


def _fits(value, tree, *, widen=True):
    """Whether a value has the type that an annotation tells; one that is not understood takes all.

    With `widen` a whole number is a float as well, as it is in Python's own annotations.
    """
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return _fits(value, tree.left, widen=widen) or _fits(value, tree.right, widen=widen)
    if isinstance(tree, ast.Subscript):
        return _fits_subscript(value, tree, widen)
    name = ast.unparse(tree).split(".")[-1]
    if name == "float" and widen and type(value) is int:
        return True
    return name not in TYPES or type(value) is TYPES[name]


def _fits_subscript(value, tree, widen):
    name = ast.unparse(tree.value).split(".")[-1].lower()
    inner = tree.slice.elts if isinstance(tree.slice, ast.Tuple) else [tree.slice]
    if name == "optional":
        return value is None or _fits(value, inner[0], widen=widen)
    if name == "union":
        return any(_fits(value, each, widen=widen) for each in inner)
    if name == "literal":
        allowed = [ast.literal_eval(each) for each in inner]
        return any(type(value) is type(each) and value == each for each in allowed)
    if name == "list":
        return type(value) is list and all(_fits(item, inner[0]) for item in value)
    if name == "dict":
        return type(value) is dict and all(_fits(item, inner[-1]) for item in value.values())
    return name not in TYPES or type(value) is TYPES[name]
