"""An index to its file and back: which of its parts go where in what `format` writes and reads."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tqsearch import format as file_format
from tqsearch.codec import Codec, Levels
from tqsearch.contents import Contents
from tqsearch.errors import CorruptFileError, InvalidInputError
from tqsearch.estimator import Estimator
from tqsearch.plan import BitPlan
from tqsearch.recipe import Metric, Recipe
from tqsearch.training.basis import Basis


def write(path: str | os.PathLike[str], plan: BitPlan, estimator: Estimator, contents: Contents) -> None:
    """Writes an index, whole or not at all.

    Args:
        path: the file.
        plan: what was asked for, before training.
        estimator: what made the columns.
        contents: the columns and ids.
    """
    quantizer = estimator.quantizer
    basis = quantizer.basis
    header = file_format.Header(
        dim=quantizer.dim,
        metric=estimator.metric,
        plan=plan.pairs(),
        rotation=quantizer.rotation.name,
        seed=quantizer.seed,
        count=len(contents),
        next_id=contents.next_id,
        learnt_plan=None if basis is None else quantizer.plan.pairs(),
        keeps_product=None if basis is None else estimator.keeps_product,
        codec=None if quantizer.codec == "scalar" else quantizer.codec,
        slopes=None if basis is None or basis.slopes is None else True,
        levels="even" if basis is not None and basis.even else None,
    )
    segments = [columns for _, columns in contents.rows.runs()]
    if contents.in_order:
        for columns in segments:
            columns.pop("ids", None)  # of the views, not of the index
    constants: dict[str, Tensor] = {}
    if quantizer.centre is not None:
        constants["centre"] = quantizer.centre
    if basis is not None:
        constants.update(axes=basis.axes, deviations=basis.deviations)
        if basis.slopes is not None:
            constants["slopes"] = basis.slopes
    file_format.write(path, header, segments, constants)


def read(path: str | os.PathLike[str], device: torch.device, backend: str) -> tuple[Recipe, Estimator, Contents]:
    """Reads and verifies an index; on a CPU the columns stay memory-mapped.

    Raises:
        ForeignFileError, CorruptFileError, NewerFormatError: the file is not such a file, is truncated or altered, or
            is from a newer version.
        OSError: the file cannot be read.
    """
    header, columns, constants = file_format.read(path)
    metric: Metric = header.metric  # type: ignore[assignment]  # checked by the recipe
    codec: Codec = header.codec or "scalar"  # type: ignore[assignment]  # likewise
    levels: Levels = header.levels or "optimal"  # type: ignore[assignment]  # likewise
    try:
        plan = BitPlan.from_pairs(header.plan)
        recipe = Recipe(header.dim, plan, metric, header.rotation, header.seed, codec, backend)
        estimator = recipe.estimator()
        if constants:
            basis = None
            if header.learnt_plan is not None:
                learnt_plan = BitPlan.from_pairs(header.learnt_plan)
                axes, deviations = constants["axes"].clone(), constants["deviations"].clone()
                slopes = constants["slopes"].clone() if header.slopes else None
                basis = Basis(learnt_plan, axes, deviations, codec, levels, slopes)
            estimator = recipe.estimator(constants["centre"].clone(), basis, header.keeps_product is not False)
    except InvalidInputError as error:
        raise CorruptFileError(f"{path} is not consistent: its header asks for what cannot be ({error})") from error
    return recipe, estimator, Contents.of(columns, header.count, header.next_id, device)
