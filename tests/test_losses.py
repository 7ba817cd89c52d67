"""Losses against plain loops over pixels, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from peft_talora.losses import check_labels, task_loss
from peft_talora.msam.tasks import TaskSpec

SPECS = {
    "semantic": TaskSpec("semantic", 4),
    "parts": TaskSpec("parts", 3, ignore_index=1),
    "binary": TaskSpec("binary"),
    "depth": TaskSpec("depth"),
    "normals": TaskSpec("normals"),
    "regression": TaskSpec("regression", 2),
}


def make_labels(spec, height=7, width=5, seed=0):
    """Labels of three images: partly labelled, barely labelled, not labelled."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, height, width)
    known = torch.rand(shape, generator=generator) < torch.tensor([0.7, 0.1, 0.0])[:, None, None]
    known[:2, 2, 3] = True
    other = torch.rand(shape, generator=generator) < 0.5
    if spec.task_kind.layout == "map":
        classes = torch.randint(spec.num_channels, shape, generator=generator)
        classes[known & (classes == spec.ignore_index)] = 0
        return torch.where(known, classes, torch.where(other, -1, spec.ignore_index)), known
    values = torch.rand((3, spec.num_channels, height, width), generator=generator, dtype=torch.float64) + 0.1
    known_c, other_c = known[:, None], other[:, None]
    if spec.kind == "binary":
        values = (values > 0.8).double()
        values[:2, :, 2, 3] = 1.0
        return torch.where(known_c, values, torch.where(other_c, 255.0, torch.nan)), known
    if spec.kind == "normals":
        return torch.where(known_c, values - 0.5, torch.where(other_c, 0.0, torch.nan)), known
    if spec.kind == "depth":
        return torch.where(known_c, values, torch.where(other_c, -1.0, torch.inf)), known
    return torch.where(known_c, values, torch.where(other_c, torch.nan, torch.inf)), known


def pixel_reference(spec, logits, label, positive_weight):
    """Loss of one pixel from lists of numbers."""
    if spec.task_kind.layout == "map":
        highest = max(logits)
        return highest + math.log(sum(math.exp(x - highest) for x in logits)) - logits[int(label)]
    if spec.kind == "binary":
        probability = 1 / (1 + math.exp(-logits[0]))
        return -(positive_weight * label[0] * math.log(probability) + (1 - label[0]) * math.log(1 - probability))
    if spec.kind == "normals":
        dot = sum(a * b for a, b in zip(logits, label, strict=True))
        return 1 - dot / math.sqrt(sum(a * a for a in logits) * sum(b * b for b in label))
    return sum(abs(a - b) for a, b in zip(logits, label, strict=True)) / len(logits)


def reference(spec, logits, labels, known):
    """Mean over labelled images of the mean over labelled pixels; logits are at the labels' resolution."""
    images = []
    for image in range(len(logits)):
        pixels = [(y, x) for y in range(known.shape[1]) for x in range(known.shape[2]) if known[image, y, x]]
        if not pixels:
            continue
        weight = None
        if spec.kind == "binary":
            positives = sum(float(labels[image, 0, y, x]) for y, x in pixels)
            weight = min(max((len(pixels) - positives) / positives, 1.0), 20.0)
        losses = [
            pixel_reference(spec, logits[image, :, y, x].tolist(), labels[image, ..., y, x].tolist(), weight)
            for y, x in pixels
        ]
        images.append(sum(losses) / len(losses))
    return sum(images) / len(images)


def make_logits(spec, height=7, width=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, spec.num_channels, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", SPECS)
def test_against_loops(name):
    spec = SPECS[name]
    labels, known = make_labels(spec)
    logits = make_logits(spec)
    loss = task_loss(spec, logits, labels)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(reference(spec, logits, labels, known), rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_resized_to_the_labels(name):
    spec = SPECS[name]
    labels, known = make_labels(spec, 14, 9)
    logits = make_logits(spec, 4, 3)
    resized = F.interpolate(logits, size=(14, 9), mode="bilinear", align_corners=False)
    assert task_loss(spec, logits, labels).item() == pytest.approx(reference(spec, resized, labels, known), rel=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_gradients(name):
    spec = SPECS[name]
    labels, _ = make_labels(spec, 6, 6)
    logits = make_logits(spec, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: task_loss(spec, x, labels), logits)
    task_loss(spec, logits, labels).backward()
    assert logits.grad[:2].abs().sum() > 0
    assert logits.grad[2].eq(0).all()


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("name", SPECS)
def test_nothing_labelled_is_exactly_zero(name, value):
    spec = SPECS[name]
    labels = make_labels(spec)[0][2:]
    logits = torch.full((1, spec.num_channels, 3, 3), value, requires_grad=True)
    loss = task_loss(spec, logits, labels)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()


@pytest.mark.parametrize("name", SPECS)
def test_no_image_at_all(name):
    spec = SPECS[name]
    logits = torch.zeros(0, spec.num_channels, 3, 3, requires_grad=True)
    loss = task_loss(spec, logits, make_labels(spec)[0][:0])
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("name", SPECS)
def test_unlabelled_places_do_not_matter(name):
    spec = SPECS[name]
    labels, known = make_labels(spec)
    logits = make_logits(spec)
    wild = torch.where(known[:, None], logits, torch.inf).requires_grad_()
    loss = task_loss(spec, wild, labels)
    loss.backward()
    assert loss.item() == pytest.approx(task_loss(spec, logits, labels).item(), abs=1e-12)
    assert torch.isfinite(wild.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float32_at_least(dtype):
    spec = TaskSpec("depth")
    logits = torch.full((1, 1, 300, 300), 2.0, dtype=dtype)
    loss = task_loss(spec, logits, torch.full((1, 1, 300, 300), 1.0))
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0


def test_rare_positives_weigh_more():
    labels = torch.zeros(1, 1, 10, 10)
    labels[..., 0, :2] = 1  # 98 negatives: the ratio of 49 is cut at 20
    miss = task_loss(TaskSpec("binary"), torch.zeros(1, 1, 10, 10), labels)
    assert miss.item() == pytest.approx(math.log(2) * (2 * 20 + 98) / 100)


@pytest.mark.parametrize("name", SPECS)
def test_compiles_without_a_graph_break(name):
    spec = SPECS[name]
    labels, _ = make_labels(spec)
    logits = make_logits(spec, 4, 4)

    def checked_loss(logits, labels):
        check_labels("task", spec, labels, 3)
        return task_loss(spec, logits, labels)

    compiled = torch.compile(checked_loss, fullgraph=True, backend="eager")
    assert compiled(logits, labels).item() == pytest.approx(task_loss(spec, logits, labels).item(), abs=1e-12)


@pytest.mark.parametrize("name", SPECS)
def test_fitting_labels_pass(name):
    labels, _ = make_labels(SPECS[name])
    check_labels(name, SPECS[name], labels, 3)
    with pytest.raises(ValueError, match=rf"labels\['{name}'\]: .* needs shape"):
        check_labels(name, SPECS[name], labels, 4)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("semantic", torch.zeros(2, 1, 4, 4, dtype=torch.long), r"'here'.*\(2, H, W\).*\(2, 1, 4, 4\)"),
        ("semantic", torch.zeros(3, 4, 4, dtype=torch.long), r"\(2, H, W\).*\(3, 4, 4\)"),
        ("semantic", torch.zeros(2, 4, 4), "integer.*float32"),
        ("semantic", torch.full((2, 4, 4), 4), "4 is neither ignore_index .255. nor at most 3"),
        ("depth", torch.zeros(2, 4, 4), r"\(2, 1, H, W\).*\(2, 4, 4\)"),
        ("normals", torch.zeros(2, 1, 4, 4), r"\(2, 3, H, W\)"),
        ("binary", torch.full((2, 1, 4, 4), 128.0), "128"),
        ("depth", [[1.0]], "list"),
    ],
)
def test_labels_that_do_not_fit(kind, labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels("here", SPECS[kind], labels, 2)


class TestStructureLoss:
    """The loss of binary tasks in the Conv-LoRA recipe (F3Net's)."""

    SPEC = TaskSpec("binary", loss="structure")

    def make(self, height=40, width=33, images=2):
        generator = torch.Generator().manual_seed(0)
        labels = torch.zeros(images, 1, height, width, dtype=torch.float64)
        labels[:, :, 5:30, 8:20] = 1
        logits = 2 * torch.randn(images, 1, height, width, dtype=torch.float64, generator=generator)
        return logits.requires_grad_(), labels

    def published(self, logits, labels):
        """As released: pixel weights from a 31 x 31 mean, weighted cross entropy plus weighted IoU."""
        weight = 1 + 5 * (F.avg_pool2d(labels, kernel_size=31, stride=1, padding=15) - labels).abs()
        bce = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        bce = (weight * bce).sum((2, 3)) / weight.sum((2, 3))
        probability = logits.sigmoid()
        intersection = (probability * labels * weight).sum((2, 3))
        union = ((probability + labels) * weight).sum((2, 3))
        return (bce + 1 - (intersection + 1) / (union - intersection + 1)).mean()

    def test_value_and_gradient_are_the_published_ones(self):
        logits, labels = self.make()
        loss, expected = task_loss(self.SPEC, logits, labels), self.published(logits, labels)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12) and loss > 0.5
        got, want = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)

    def test_unlabelled_pixels_are_like_what_is_beyond_the_image(self):
        logits, labels = self.make()
        larger = F.pad(labels, (20, 20, 20, 20), value=255)
        wild = F.pad(logits.detach(), (20, 20, 20, 20), value=torch.inf).requires_grad_()
        loss = task_loss(self.SPEC, wild, larger)
        assert loss.item() == pytest.approx(self.published(logits, labels).item(), abs=1e-12)
        loss.backward()
        inner = wild.grad[:, :, 20:-20, 20:-20]
        assert wild.grad.isfinite().all() and wild.grad.abs().sum() == inner.abs().sum() > 0

    @pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
    def test_nothing_labelled_is_exactly_zero(self, value):
        logits = torch.full((2, 1, 8, 8), value, requires_grad=True)
        loss = task_loss(self.SPEC, logits, torch.full((2, 1, 8, 8), -1.0))
        loss.backward()
        assert loss.item() == 0 and logits.grad.eq(0).all()

    def test_float16_logits(self):
        logits, labels = self.make()
        loss = task_loss(self.SPEC, logits.half(), labels)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
            self.published(logits, labels).item(), rel=1e-2
        )

    def test_the_field(self):
        assert TaskSpec.from_dict(self.SPEC.to_dict()) == self.SPEC != TaskSpec("binary")
        with pytest.raises(
            ValueError, match=r"loss of a binary task must be one of \[None, 'structure'\], got 'dice'"
        ):
            TaskSpec("binary", loss="dice")
        with pytest.raises(ValueError, match=r"loss of a depth task must be one of \[None\], got 'structure'"):
            TaskSpec("depth", loss="structure")
