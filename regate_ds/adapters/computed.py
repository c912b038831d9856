"""What a run reads of its data beside the batches: reference losses and the image orders."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.config import RegateConfig
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.online import OnlineReference

Reference = ReferenceStore | OnlineReference


@dataclass(frozen=True)
class Computed:
    """What was computed before the run, or, by an online teacher, is computed along with it."""

    reference: Reference | None = None
    """The teacher's losses; None where the score reads none."""

    orders: ImageOrderStore | None = None
    """The orders of image tokens; None where the ranking reads none."""

    def __post_init__(self) -> None:
        """Refuse, by ValueError, what is no store; a path, say."""
        reference, orders = self.reference, self.orders
        swapped = isinstance(reference, ImageOrderStore)
        if swapped or (reference is not None and not hasattr(reference, "read")):
            raise ValueError(
                f"reference={reference!r} is a {type(reference).__name__}; give a ReferenceStore "
                "or Teacher(...).online()"
            )
        if orders is not None and not isinstance(orders, ImageOrderStore):
            raise ValueError(
                f"orders={orders!r} is a {type(orders).__name__}; give an ImageOrderStore"
            )

    def require(self, config: RegateConfig, *, online: bool = False) -> None:
        """Refuse, by ValueError, a run without what its score or its ranking reads.

        It needs the arguments alone, so that every rank that attaches raises. online: whether the
        host can use a teacher that scores while training.
        """
        if isinstance(self.reference, OnlineReference) and not online:
            raise ValueError(
                "reference is an online teacher, which this host cannot use; write a store with "
                "score_dataset and give ReferenceStore(path)"
            )
        if config.needs_reference and self.reference is None:
            raise ValueError(
                f"score={type(config.score).__name__} needs the teacher's losses, but "
                "reference=None; give a ReferenceStore, or an online teacher, or set "
                "execution=none for the dense run"
            )
        if isinstance(self.reference, Reference):
            self.reference.require_column(config.column)
        if (ranking := config.stored_ranking) is None:
            return
        if self.orders is None:
            raise ValueError(
                f"images.ranking={type(config.images.ranking).__name__} reads orders that are "
                "computed once, but orders=None; compute them with rank_images and give an "
                "ImageOrderStore, or use images.ranking=random or stride"
            )
        self.orders.require_ranking(ranking)
        if isinstance(self.reference, ReferenceStore):
            self.orders.require(self.reference.fingerprint)
