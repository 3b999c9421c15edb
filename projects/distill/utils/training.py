"""State of the training that detectron2 keeps in its event storage."""

from detectron2.utils.events import get_event_storage, has_event_storage


def current_iteration() -> int:
    """Return the iteration of the training, or 0 outside a training."""
    return get_event_storage().iter if has_event_storage() else 0
