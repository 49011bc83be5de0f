"""What the terms of an objective read: both networks' outputs on one batch, and what can be computed from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Int

from ._checks import check_fields
from .network import Outputs, check_outputs

Pullback: TypeAlias = Callable[..., Any]
"""`pullback(cotangent [B, K], stage=None)`: the gradient of `sum(cotangent * logits)` at the images, or at the map of a
stage that a term names in `Term.gradient_stages`."""


class Leading(NamedTuple):
    """A network on the first images of a batch, by a separate forward pass in evaluation mode."""

    outputs: Outputs
    pullback: Pullback


class TeacherRecord(NamedTuple):
    """The teacher's outputs on one batch, in evaluation mode: constants, and the same for all its students.

    Attributes:
      labels: class indices, `[B]`.
      outputs: the teacher's.
      pullback: the pull-back of its logits; see `Record.teacher_pullback`.
      leading: the teacher on the first `count` images alone; see `Record.teacher_leading`.
      key: the step's random key, see `Record.key`.
      parts: results of `Term.of_teacher` that are already computed, by the term's name.
    """

    labels: Int[Array, " batch"]
    outputs: Outputs
    pullback: Pullback
    leading: Callable[[int], Leading] | None
    key: Any = None
    parts: Mapping[str, Any] = {}


class NotStored(ValueError):
    """A term reads an output of the teacher that is not stored; `what` names it."""

    def __init__(self, what: str):
        super().__init__(
            f"the teacher's {what} are read, and are not among its stored outputs: drop the term, or leave them out of "
            "the batch, so that the teacher is run"
        )
        self.what = what


class StoredOutputs(Outputs):
    """A teacher's outputs that were computed before: its logits, and its pooled vectors if they were kept.

    Raises:
      NotStored: any other output is read.
    """

    @classmethod
    def of(cls, logits: Array, pooled: Array | None = None) -> "StoredOutputs":
        """Outputs without maps, and perhaps without pooled vectors."""
        return cls(logits, (), pooled)  # pyright: ignore[reportArgumentType]

    @property
    def features(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Never stored."""
        raise NotStored("maps")

    @property
    def pooled(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The vectors, if they were kept."""
        if self[2] is None:
            raise NotStored("pooled vectors")
        return self[2]


def no_pullback(cotangent: Array, stage: int | None = None) -> Array:
    """The pull-back of stored outputs.

    Raises:
      NotStored: always.
    """
    raise NotStored("gradients")


@dataclass(frozen=True)
class Record:
    """What the terms may read. Nothing is computed that no term reads.

    Attributes:
      labels: class indices, `[B]`.
      student: the student's outputs in training mode.
      teacher: the teacher's outputs in evaluation mode; None when the student learns alone.
      student_views: by projection name, what the projection made of the student's outputs, for instance its map in the
        teacher's width, `[B, h, w, c]`.
      teacher_views: by projection name, the teacher's side of it.
      student_pullback: shares the forward pass behind `student`, in training mode: BatchNorm's cross terms between
        images are included.
      teacher_pullback: the same for the teacher, in evaluation mode; a constant.
      leading: the student on the first `count` images alone; its running statistics are constants there.
      teacher_leading: the teacher on the first `count` images alone.
      per_image: wraps a function `f(*arrays [B, ...], **shared) -> [B]` that treats each image independently so that
        every device runs it on its own images, without communication. The default (one device) returns the function
        unchanged.
      whole_batch: wraps a function of the same form that compares the images of the batch with each other so that it
        runs on the global batch, which is gathered before the call and not inside it.
      key: this step's random key, for losses that draw random numbers.
    """

    labels: Int[Array, " batch"]
    student: Outputs
    teacher: Outputs | None = None
    student_views: Mapping[str, Any] = field(default_factory=dict)
    teacher_views: Mapping[str, Any] = field(default_factory=dict)
    student_pullback: Pullback | None = None
    teacher_pullback: Pullback | None = None
    leading: Callable[[int], Leading] | None = None
    teacher_leading: Callable[[int], Leading] | None = None
    per_image: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    whole_batch: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    key: Any = None

    def __post_init__(self):
        check_fields(self)
        for name in ("student", "teacher"):
            # Stored outputs have no maps to check; their rows are checked with the batch that holds them.
            if getattr(self, name) is not None and not isinstance(getattr(self, name), StoredOutputs):
                check_outputs(f"{name}, for labels {self.labels.shape},", getattr(self, name), self.labels.shape[0])

    def taught(self) -> Outputs:
        """The teacher's outputs.

        Raises:
          ValueError: there is no teacher.
        """
        if self.teacher is None:
            raise ValueError(
                "this term needs a teacher, and the step was given none: pass teacher=... or drop the term"
            )
        return self.teacher
