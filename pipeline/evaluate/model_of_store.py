"""The language model that a store was made with: named or recorded, and compared by digest."""

from ...store.reader import ActivationStore
from ..errors import ModelError
from ..harvest.model_facts import ModelFacts, facts_of_recorded, is_recorded
from ..harvest.model_files import DEMO, is_hub_id
from ..progress import Progress


def model_of(store: ActivationStore, named: str | None, progress: Progress) -> tuple[str, ModelFacts]:
    """Find the language model that a store was made with, by its digest rather than its name.

    Args:
        store: whose model.
        named: folder or hub id of the model; by default what the store records.
        progress: reports that the weights could not be compared.

    Returns:
        The name to load the model by, and its facts.

    Raises:
        ModelError: the store records a local model and none is named, the model is another one, or there is
            no such model, as for a planted or imported store.
    """
    manifest = store.manifest
    if manifest.planted:
        raise ModelError(
            f"no model gives the activations of {store.root}: an effect was planted into them; "
            "run a model only with what was trained on a harvest"
        )
    refuse_imported(store)
    name, recorded = named or manifest.model, manifest.model_revision
    is_on_hub = is_hub_id(manifest.model, recorded)
    if named is None and name != DEMO and not is_on_hub:
        raise ModelError(
            f"{store.root} was made with a model in a local folder, {name}; name that folder with --model"
        )
    facts = facts_of_recorded(name, manifest)
    problem = f"{name} is not {manifest.model}, the model that {store.root} was made with"
    if facts.config_hash != manifest.model_config_hash:
        raise ModelError(f"{problem}: their configurations differ; name the right one with --model")
    if recorded is None:
        progress.say(f"{store.root} does not say which weights it was made with: those of {name} are taken")
    elif not is_recorded(name, facts, manifest):
        remedy = "name the right one with --model"
        if is_on_hub:
            fetch = f"hf download {manifest.model} --revision {recorded} --local-dir FOLDER"
            remedy = f"leave --model out, or get a copy: {fetch}"
        raise ModelError(
            f"{problem}: its weights and tokenizer are {facts.revision}, not {recorded}; {remedy}"
        )
    return name, facts


def refuse_imported(store: ActivationStore) -> None:
    """Refuse a store whose activations another program left.

    Raises:
        ModelError: its model and tokenizer cannot be checked.
    """
    if store.manifest.imported:
        raise ModelError(
            f"{store.root} was imported, so its model and tokenizer cannot be checked; score the run without "
            "--ce-loss and --probing"
        )
