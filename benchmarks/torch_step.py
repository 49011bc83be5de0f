"""PyTorch's side of step_time.py: the same networks, losses and optimiser in plain PyTorch, as a worker.

Eager or under torch.compile, on CUDA where there is a device. Modules carry the names of this package's parameters and
are filled from the .npz that jax_step.py wrote.
"""

import contextlib
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from _common import cores
from _worker import Stopwatch, peak_memory, reset_peak_memory, serve
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# --- networks ---------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, then normalisation."""

    def __init__(self, channels, filters, kernel_size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(filters)

    def forward(self, x):
        """The map, before any nonlinearity."""
        return self.norm(self.conv(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, channels, width, stride):
        super().__init__()
        self.first = ConvNorm(channels, width, 3, stride)
        self.second = ConvNorm(width, width, 3)
        self.shortcut = ConvNorm(channels, width, 1, stride) if stride != 1 or channels != width else nn.Identity()

    def forward(self, x):
        """The map after its ReLU."""
        residual = self.shortcut(x)
        x = F.relu(self.first(x), inplace=True)
        return F.relu(self.second(x) + residual, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which takes the stride) and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, channels, width, stride):
        super().__init__()
        filters = 4 * width
        self.reduce = ConvNorm(channels, width, 1)
        self.middle = ConvNorm(width, width, 3, stride)
        self.expand = ConvNorm(width, filters, 1)
        self.shortcut = ConvNorm(channels, filters, 1, stride) if stride != 1 or channels != filters else nn.Identity()

    def forward(self, x):
        """The map after its ReLU."""
        residual = self.shortcut(x)
        x = F.relu(self.reduce(x), inplace=True)
        x = F.relu(self.middle(x), inplace=True)
        return F.relu(self.expand(x) + residual, inplace=True)


class ResNet(nn.Module):
    """With a 3x3 stem at stride 1."""

    def __init__(self, block, depths, widths, classes):
        super().__init__()
        channels, *stage_widths = widths
        self.stem = ConvNorm(3, channels, 3)
        self.blocks = []
        for stage, (depth, width) in enumerate(zip(depths, stage_widths, strict=True), start=1):
            for index in range(1, depth + 1):
                self.blocks.append(f"stage{stage}_block{index}")
                self.add_module(self.blocks[-1], block(channels, width, 2 if stage > 1 and index == 1 else 1))
                channels = block.expansion * width
        self.width = channels
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        """Logits, and the map that is pooled."""
        x = F.relu(self.stem(x), inplace=True)
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3))), x


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel by itself, narrow again."""

    def __init__(self, channels, filters, expansion, stride):
        super().__init__()
        hidden = channels * expansion
        self.expand = ConvNorm(channels, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = ConvNorm(hidden, filters, 1)
        self.residual = stride == 1 and channels == filters

    def forward(self, x):
        """The map, without a nonlinearity."""
        hidden = F.relu(self.expand(x), inplace=True)
        hidden = F.relu(self.depthwise_norm(self.depthwise(hidden)), inplace=True)
        projected = self.project(hidden)
        return x + projected if self.residual else projected


class MobileNetV2(nn.Module):
    """The distillation tables' form: stem at stride 2, no ReLU6, expansion also in the first block."""

    def __init__(self, width, classes):
        super().__init__()
        channels = int(32 * width)
        self.stem = ConvNorm(3, channels, 3, 2)
        self.blocks = []
        groups = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
        for group, ((expansion, base, count), stride) in enumerate(zip(groups, (1, 1, 2, 2, 1, 2, 1), strict=True), 1):
            for index in range(1, count + 1):
                filters = int(base * width)
                self.blocks.append(f"group{group}_block{index}")
                block = InvertedResidual(channels, filters, expansion, stride if index == 1 else 1)
                self.add_module(self.blocks[-1], block)
                channels = filters
        self.width = 1280
        self.last = ConvNorm(channels, self.width, 1)
        self.head = nn.Linear(self.width, classes)

    def forward(self, x):
        """Logits, and the map that is pooled."""
        x = F.relu(self.stem(x), inplace=True)
        for name in self.blocks:
            x = getattr(self, name)(x)
        x = F.relu(self.last(x), inplace=True)
        return self.head(x.mean((2, 3))), x


NETWORKS = {
    "resnet20": lambda classes: ResNet(BasicBlock, (3, 3, 3), (16, 16, 32, 64), classes),
    "resnet56": lambda classes: ResNet(BasicBlock, (9, 9, 9), (16, 16, 32, 64), classes),
    "resnet8x4": lambda classes: ResNet(BasicBlock, (1, 1, 1), (32, 64, 128, 256), classes),
    "resnet32x4": lambda classes: ResNet(BasicBlock, (5, 5, 5), (32, 64, 128, 256), classes),
    "resnet50": lambda classes: ResNet(Bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512), classes),
    "mobilenetv2": lambda classes: MobileNetV2(0.5, classes),
}


class Projection(nn.Module):
    """A linear map of the student's channels and BatchNorm; the teacher's channels are standardised."""

    def __init__(self, narrow, wide):
        super().__init__()
        self.linear = nn.Linear(narrow, wide, bias=False)
        self.norm = nn.BatchNorm1d(wide)
        self.register_buffer("teacher_mean", torch.zeros(wide))
        self.register_buffer("teacher_std", torch.ones(wide))

    def forward(self, student_map, teacher_map):
        """Both maps as point clouds `[B, positions, width]`, scaled so that squared distances are per channel."""
        batch, width = student_map.shape[0], self.teacher_mean.shape[0]
        x, y = (a.permute(0, 2, 3, 1).flatten(0, 2) for a in (student_map, teacher_map))
        x, y = self.norm(self.linear(x)), (y - self.teacher_mean) / self.teacher_std
        return tuple((a * width**-0.5).unflatten(0, (batch, -1)) for a in (x, y))


LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def fill(module, arrays, name_of):
    """Copy the arrays to which `name_of` gives one of the module's names; kernels are `[..., in, out]` in the file."""
    state = {name_of(name): torch.from_numpy(arrays[name].T) for name in arrays.files if name_of(name)}
    state = {name: value.mT if value.ndim == 4 else value for name, value in state.items()}
    fresh = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict(state | fresh)
    return module


def network_names(role):
    """From `role/params/a/b/kernel` to `a.b.weight`."""

    def name_of(name):
        own, *path = name.split("/")
        if own != role:
            return None
        _, *modules, leaf = path
        return ".".join([*modules, LEAVES.get(leaf, leaf)])

    return name_of


def projection_name(name):
    """From `projections/last/scale` to `norm.weight`."""
    own, *path = name.split("/")
    if own not in ("projections", "projection_stats"):
        return None
    leaf = path[-1]
    if leaf.startswith("teacher"):
        return leaf
    return "linear.weight" if leaf == "kernel" else f"norm.{LEAVES.get(leaf, leaf)}"


# --- losses -----------------------------------------------------------------------------------------------------------


def soft_target_kl(student_logits, teacher_logits, temperature):
    student = F.log_softmax(student_logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def sinkhorn_iterations(log_kernel, column_sums, count):
    """So many iterations and the marginal error `[B]`, made of the sums that the next iteration begins with."""
    log_a, log_b = -math.log(log_kernel.shape[1]), -math.log(log_kernel.shape[2])
    for _ in range(count):
        g = log_b - column_sums
        f = log_a - torch.logsumexp(log_kernel + g[:, None, :], 2)
        column_sums = torch.logsumexp(log_kernel + f[:, :, None], 1)
    return f, g, column_sums, (torch.exp(g + column_sums) - math.exp(log_b)).abs().sum(1)


@torch.no_grad()
def solve_transport(x, y, task, iterate):
    """Dual value `[B]` and gradient with respect to x of entropic transport.

    The whole batch iterates until its last example has converged; each is left as it was when it converged itself.
    """
    center = (x.mean(1, keepdim=True) + y.mean(1, keepdim=True)) / 2
    x, y = x - center, y - center
    squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
    cost = torch.baddbmm(squares, x, y.transpose(1, 2), alpha=-2).clamp_(min=0)
    strength = task["epsilon"] * cost.mean((1, 2)).clamp(min=torch.finfo(cost.dtype).tiny)
    log_kernel = cost.div_(-strength[:, None, None])
    f, g, column_sums = torch.zeros_like(x[:, :, 0]), torch.zeros_like(y[:, :, 0]), torch.logsumexp(log_kernel, 1)
    running = torch.ones_like(x[:, :1, 0], dtype=torch.bool)
    for _ in range(0, task["max_iterations"], task["check_every"]):
        new_f, new_g, column_sums, error = iterate(log_kernel, column_sums, task["check_every"])
        f, g = torch.where(running, new_f, f), torch.where(running, new_g, g)
        running &= error[:, None] >= task["threshold"]
        if not running.any():
            break
    plan = torch.exp(log_kernel + f[:, :, None] + g[:, None, :])
    rows = plan.sum(2)
    n, m = plan.shape[1:]
    value = strength * (f.mean(1) + g.mean(1) + math.log(n * m) + 1 - rows.sum(1))
    return value, 2 * (rows[:, :, None] * x - plan @ y)


def transport(x, y, task, iterate):
    """Its gradient is that of the cost under the plan held fixed (envelope theorem)."""
    value, gradient = solve_transport(x.detach(), y, task, iterate)
    return (value + ((x - x.detach()) * gradient).sum((1, 2))).mean()


def direction(gradient, pool):
    """Unit vectors `[B, d]` of pooled gradients, and which were zero."""
    flat = F.avg_pool2d(gradient, pool).flatten(1)
    largest = flat.detach().abs().amax(1, keepdim=True)
    is_zero = largest < torch.finfo(flat.dtype).tiny
    scaled = flat / largest.masked_fill(is_zero, 1)
    norm = scaled.square().sum(1, keepdim=True).masked_fill(is_zero, 1).sqrt()
    return scaled / norm, is_zero[:, 0]


def gradient_distance(student_gradient, teacher_gradient, pool):
    """One minus the cosine; 1 where either gradient is zero."""
    ours, ours_zero = direction(student_gradient, pool)
    theirs, theirs_zero = direction(teacher_gradient, pool)
    return (0.5 * (ours - theirs).square().sum(1)).masked_fill(ours_zero | theirs_zero, 1).mean()


# --- the step ---------------------------------------------------------------------------------------------------------

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Step:
    """One training step on a fixed batch."""

    def __init__(self, task, path, memory_format):
        self.task, self.weights = task, task["weights"]
        self.matching, self.projecting = "gradient" in self.weights, "wasserstein" in self.weights
        dtype = torch.float64 if task["dtype"] == "float64" else torch.float32
        place = {"device": DEVICE, "dtype": dtype, "memory_format": FORMATS[memory_format]}
        self.memory_format = memory_format
        teacher, student = (NETWORKS[task[role]](task["classes"]) for role in ("teacher", "student"))
        projection = Projection(student.width, teacher.width)
        with np.load(path) as arrays:
            self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous().to(**place)
            self.labels = torch.from_numpy(arrays["labels"]).to(DEVICE, torch.int64)
            self.teacher = fill(teacher, arrays, network_names("teacher")).to(**place).eval().requires_grad_(False)
            self.student = fill(student, arrays, network_names("student")).to(**place)
            self.projection = fill(projection, arrays, projection_name).to(**place)
        self.parameters = list(self.student.parameters())
        if self.projecting:
            self.parameters += self.projection.parameters()
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=task["learning_rate"],
            momentum=task["momentum"],
            weight_decay=task["weight_decay"],
            nesterov=True,
            foreach=True,
        )
        self.iterate = sinkhorn_iterations

    def compile(self):
        """Compile everything but the loop of the transport, which ends on a value, and the optimiser."""
        # Lets one graph hold a gradient and what is computed from it: across graphs, "torch.compile with aot_autograd
        # does not currently support double backward".
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            torch._dynamo.config.trace_autograd_ops = True
        self.terms = torch.compile(self.terms, dynamic=False)
        self.iterate = torch.compile(self.iterate, dynamic=False)

    def forward(self, network, images):
        """A network's logits and last map, of images in [0, 1]."""
        task = self.task
        low = task["dtype"] == "bfloat16"
        with torch.autocast(DEVICE, torch.bfloat16) if low else contextlib.nullcontext():
            logits, last = network((images - task["mean"]) / task["std"])
        return (logits.float(), last.float()) if low else (logits, last)

    def terms(self, images, probe):
        """Batch means of all terms but the transport, and both point clouds; `probe` is what the teacher sees."""
        task = self.task
        logits, last = self.forward(self.student, images)
        terms = {"ce": F.cross_entropy(logits, self.labels)}
        if len(self.weights) == 1:
            return terms, None
        with torch.set_grad_enabled(self.matching):
            targets, target_map = self.forward(self.teacher, probe)
        top = targets.argmax(1, keepdim=True)
        if self.matching:
            # One forward pass of the student serves the gradient and every other term.
            (ours,) = torch.autograd.grad(logits.gather(1, top).sum(), images, create_graph=True)
            (theirs,) = torch.autograd.grad(targets.gather(1, top).sum(), probe)
            terms["gradient"] = gradient_distance(ours, theirs, task["pool"])
        terms["kd"] = soft_target_kl(logits, targets.detach(), task["temperature"])
        return terms, self.projection(last, target_map.detach()) if self.projecting else None

    def take(self):
        """One step; the losses before it, as tensors."""
        self.optimizer.zero_grad(set_to_none=True)
        terms, clouds = self.terms(*(self.images.detach().requires_grad_(self.matching) for _ in range(2)))
        if clouds is not None:
            terms["wasserstein"] = transport(*clouds, self.task, self.iterate)
        # Not with respect to the images too, which only the inner gradient needs.
        sum(weight * terms[name] for name, weight in self.weights.items()).backward(inputs=self.parameters)
        self.optimizer.step()
        return terms

    def take_checked(self):
        """One step: raw losses and the norm of the gradient, as numbers."""
        terms = {f"{name}/raw": value.item() for name, value in self.take().items()}
        norms = torch._foreach_norm([parameter.grad for parameter in self.parameters])
        return {**terms, "gradient_norm": torch.stack(norms).norm().item()}

    def timed(self, count):
        """Seconds that so many steps take."""
        synchronise()
        start = time.perf_counter()
        for _ in range(count):
            self.take()
        synchronise()
        return time.perf_counter() - start


def synchronise():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Program:
    """What the worker serves: the step of one cell."""

    def __init__(self):
        self.stopwatch = Stopwatch()
        torch.set_num_threads(cores())
        torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
        torch.backends.cudnn.benchmark = True

    def prepare_eager(self, task, path):
        """Take the faster memory format and the first steps: the losses to compare, and the seconds of a step."""
        candidates = []
        for memory_format in FORMATS:
            step = Step(task, path, memory_format)
            checked = [step.take_checked() for _ in range(task["checked_steps"])]
            candidates.append((min(step.timed(1) for _ in range(2)), checked, step))
        seconds, checked, self.step = min(candidates, key=lambda candidate: candidate[0])
        reset_peak()
        platform = "gpu" if DEVICE == "cuda" else DEVICE
        return {
            "checked": checked,
            "step_seconds": seconds,
            "memory_format": self.step.memory_format,
            "platform": platform,
        }

    def prepare_compiled(self, task, path, memory_format):
        """Compile, and take the first steps; what they take longer than later ones is the time of compilation."""
        self.step = Step(task, path, memory_format)
        self.step.compile()
        start = time.perf_counter()
        checked = [self.step.take_checked() for _ in range(task["checked_steps"])]
        elapsed = time.perf_counter() - start
        seconds = min(self.step.timed(1) for _ in range(2))
        prepared = {"compile_seconds": elapsed - len(checked) * seconds, "peak_bytes": peak()}
        reset_peak()
        return {**prepared, "checked": checked, "step_seconds": seconds}

    def run(self, steps):
        """Seconds that so many steps take."""
        with self.stopwatch:
            self.step.timed(steps)
        return self.stopwatch.last

    def finish(self):
        """Peak memory since the preparation, and how idle the process was between its turns."""
        return {"peak_bytes": peak(), "idle_load": self.stopwatch.idle_load()}


def peak():
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else peak_memory()


def reset_peak():
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reset_peak_memory()


if __name__ == "__main__":
    program = Program()
    serve(
        {
            "prepare_eager": program.prepare_eager,
            "prepare_compiled": program.prepare_compiled,
            "run": program.run,
            "finish": program.finish,
        }
    )
