"""Open what a run reads of its data beside the batches, and say whose it is."""

from __future__ import annotations

from regate_ds.adapters.computed import Computed, Reference
from regate_ds.job.process import Process
from regate_ds.ranking.api import model_id_for
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.reader import ReferenceStore


def open_computed(config: RunConfig, corpus: Corpus, process: Process) -> Computed:
    """Open the stores that the run reads, or build the online teacher. Collective over all ranks.

    ValueError if a store is of other data, or of another ranking.
    """
    return Computed(_open_reference(config, corpus, process), _open_orders(config, corpus))


def origin_of(computed: Computed) -> dict[str, str | None]:
    """Return the names of the models whose losses and features the run reads, for its summary."""
    origin: dict[str, str | None] = {}
    if computed.reference is not None:
        origin["teacher_id"] = computed.reference.teacher_id
    if computed.orders is not None:
        origin["orders_ranking"] = computed.orders.ranking
        origin["orders_model_id"] = computed.orders.model_id
    return origin


def _open_reference(config: RunConfig, corpus: Corpus, process: Process) -> Reference | None:
    if not config.needs_teacher:
        return None
    if config.scores_online:
        # Imported only here: it may need deepspeed, which a run through Megatron-core does not.
        from regate_ds.recipe.online_teacher import open_online

        return open_online(config.teacher, corpus, process)
    assert config.teacher.store is not None
    store = ReferenceStore(config.teacher.store, verify=config.teacher.verify, index=corpus.index)
    store.require_column(config.elision.column)
    return store


def _open_orders(config: RunConfig, corpus: Corpus) -> ImageOrderStore | None:
    ranking = config.elision.stored_ranking
    if ranking is None:
        return None
    assert config.rank.store is not None
    store = ImageOrderStore(config.rank.store, verify=config.rank.verify)
    store.require(corpus.index.fingerprint)
    store.require_ranking(ranking)
    if (found := model_id_for(ranking, corpus.student.model)) != store.model_id:
        raise ValueError(
            f"the image orders in {store.path} are of model {store.model_id}, this run starts from "
            f"{found}; run `regate rank` with this run's model.path, in another rank.store"
        )
    return store
