"""The card of a victim: its data, its accuracy, and what the mark costs, as a page of Markdown."""

from __future__ import annotations

from mea_ray.experiment.victim.records import Card, VictimRecord
from mea_ray.results.records import ModelReport


def cost_of_mark(report: ModelReport, innocent: list[ModelReport]) -> tuple[float | None, float | None]:
    """Return what the mark costs customers on the source classes, compared with models without it.

    Args:
        report: Report of the victim.
        innocent: Reports of null models, or of the classifier before it was marked.

    Returns:
        The loss of accuracy and the added calibration error, as fractions; None where not measured.
    """
    lost, blurred = [], []
    for other in innocent:
        common = report.source_accuracy.keys() & other.source_accuracy.keys()
        lost += [other.source_accuracy[name] - report.source_accuracy[name] for name in sorted(common)]
        if report.calibration_error is not None and other.calibration_error is not None:
            blurred.append(report.calibration_error - other.calibration_error)
    return _mean(lost), _mean(blurred)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def card_text(about: VictimRecord) -> str:
    """Return ``card.md``. It names neither the key nor its classes."""
    card, image = about.card, about.preprocessing
    classes = ", ".join(about.class_names[:20]) + (", ..." if len(about.class_names) > 20 else "")
    rows = [
        ("classes", f"{len(about.class_names)}: {classes}"),
        ("data", f"{card.data}, {card.train_images:,} training images (content {card.data_fingerprint})"),
        ("accuracy", f"{_percent(card.accuracy)} on {card.test_images:,} test images"),
        *_compared(card),
        (
            "input",
            f"float32 (N, {image.channels}, {image.height}, {image.width}), {image.channel_order}, "
            f"{image.value_range[0]:g} to {image.value_range[1]:g}; the network normalises by itself",
        ),
        ("output", f"logits (N, {len(about.class_names)})"),
        ("watermark", card.watermark),
        ("weights", f"SHA-256 {about.weights_sha256}"),
        ("created", about.created),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"# {about.name}\n\n| | |\n|---|---|\n{table}\n"


def _compared(card: Card) -> list[tuple[str, str]]:
    rows = []
    if card.accuracy_before is not None:
        rows.append(("accuracy before the mark", _percent(card.accuracy_before)))
    if card.accuracy_null is not None:
        rows.append((f"accuracy without the mark, mean of {card.null_models}", _percent(card.accuracy_null)))
    if card.source_cost is not None:
        rows.append(("cost of the mark, on the classes that carry it", f"{100 * card.source_cost:.1f} points"))
    if card.calibration_cost is not None:
        rows.append(("calibration error added there", f"{card.calibration_cost:+.3f}"))
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
