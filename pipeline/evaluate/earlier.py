"""Earlier scores of a run: kept if they are of the same store, set aside if they are of another one.

Some scores take hours, so none is overwritten by scores that do not replace it.
"""

from typing import Any

from ..errors import RunError
from ..progress import Progress
from ..runs import EVALUATION, Run
from .held_out import HeldOut
from .scoring.evaluation import Evaluation, parse_evaluation


def kept_scores(held_out: HeldOut) -> dict[str, Any]:
    """The scores of an earlier evaluation on the same store that this one may leave out."""
    for name in (EVALUATION, *sorted(path.name for path in held_out.run.folder.glob("evaluation-*.json"))):
        earlier = _read(held_out.run, name)
        if earlier and _is_of_same_store(earlier, held_out):
            return earlier.model_dump(include={"ce_loss", "probing"})
    return {}


def set_aside(held_out: HeldOut, progress: Progress) -> None:
    """Copy scores on another store to ``evaluation-IDENTITY.json``, as ``evaluation.json`` will be replaced.

    Raises:
        StoreWriteError: the disk refused.
    """
    earlier = _read(held_out.run, EVALUATION)
    if earlier and not _is_of_same_store(earlier, held_out):
        name = _name_aside(earlier.store.get("identity"))
        held_out.run.write_json(name, earlier.model_dump(mode="json"))
        progress.say(f"the scores on {earlier.store.get('path')} are kept in {held_out.run.folder / name}")


def _is_of_same_store(scores: Evaluation, held_out: HeldOut) -> bool:
    # A store without a seal has no digests, so only its path identifies it.
    read = held_out.store.digests(held_out.layer)
    is_same = bool(read) or scores.store.get("path") == held_out.store.address
    return is_same and scores.store.get("read") == read


def _read(run: Run, name: str) -> Evaluation | None:
    try:
        return parse_evaluation(run.scores(name), run.folder)
    except RunError:  # missing, or not worth keeping
        return None


def _name_aside(identity: Any) -> str:
    # The identity was read from a file, so it may be anything; the name must stay within the run's folder.
    digits = str(identity)[:8]
    return f"evaluation-{digits if digits.isalnum() and identity else 'unsealed'}.json"
