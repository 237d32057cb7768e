"""Blocks of random modules: what is done to the hidden state between a module's inputs and its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from random_modules import Layout, Writer

TOKENS, CLASSES = 11, 5


@dataclass(frozen=True)
class _Block:
    write: Callable[[Writer], None]
    layouts: tuple[Layout, ...]
    weight: float
    keeps: bool
    """Whether shape and width of the hidden state stay."""


BLOCKS: list[_Block] = []


def block(
    *layouts: Layout, weight: float = 1.0, keeps: bool = True
) -> Callable[[Callable[[Writer], None]], Callable[[Writer], None]]:
    """Register a block for some layouts; `weight` says how often it is drawn."""

    def registered(write: Callable[[Writer], None]) -> Callable[[Writer], None]:
        BLOCKS.append(_Block(write, layouts, weight, keeps))
        return write

    return registered


def add_blocks(writer: Writer, count: int) -> None:
    """Add so many blocks, and a heavy one at each end so that there is something to cut."""
    for place in range(count):
        if writer.layout == "BCHW" and place == count - 1 and writer.size < 2:
            break
        add_block(writer)
        if place == count // 2 and writer.layout != "BCHW":
            _dense(writer)


def add_block(writer: Writer, *, keeping: bool = False) -> None:
    """Add a block that suits the layout; with `keeping` one after which shape and width are as before."""
    suiting = [each for each in BLOCKS if writer.layout in each.layouts and (each.keeps or not keeping)]
    [chosen] = writer.draw.choices(suiting, [each.weight for each in suiting])
    writer.note(chosen.write.__name__)
    chosen.write(writer)


# --- inputs -----------------------------------------------------------------------------------------------------------


def add_inputs(writer: Writer) -> None:
    """Draw the inputs, and make the first hidden state of them."""
    kinds: Sequence[Callable[[Writer, int], None]] = (
        _tokens,
        _tokens,
        _tokens,
        _sequence,
        _vectors,
        _vectors,
        _picture,
    )
    batch = writer.pick(2, 3, 4)
    writer.batch = batch
    writer.pick(*kinds)(writer, batch)


def _tokens(writer: Writer, batch: int) -> None:
    length = writer.pick(5, 6, 7)
    name, role = writer.pick(("input_ids", None), ("tokens", "tokens"), ("ids", "tokens"), ("ids", None))
    if role:
        writer.roles[name] = role
    dynamic = name == "input_ids" or role == "tokens"
    writer.note("tokens of any length" if dynamic else "tokens of one length")
    writer.inputs[name] = f"torch.randint(1, {TOKENS}, ({batch}, {length}), generator=g)"
    writer.layout, writer.width, writer.length = "BTD", writer.pick(6, 8, 12), None if dynamic else length
    writer.example_length = length
    padding = writer.pick("", "", "", ", padding_idx=0", ", padding_idx=0", ", scale_grad_by_freq=True")
    writer.embedding = writer.own("embedding", f"nn.Embedding({TOKENS}, {writer.width}{padding})")
    writer.say(f"h = {writer.embedding}({name})")
    if writer.chance(0.15):
        writer.note("frozen embedding")
        writer.init.append(f"{writer.embedding}.weight.requires_grad_(False)")
    if writer.chance(0.25):
        writer.note("token types")
        writer.inputs["kinds"] = f"torch.randint(0, 3, ({batch}, {length}), generator=g)"
        if dynamic:
            writer.roles["kinds"] = "tokens"
        writer.say(f"h = h + {writer.own('kinds', f'nn.Embedding(3, {writer.width})')}(kinds)")
    if writer.chance(0.3):
        _mask_input(writer, batch, length, dynamic)
    if writer.chance(0.15):
        _extra_vector(writer, batch)


def _sequence(writer: Writer, batch: int) -> None:
    length, features = writer.pick(5, 6, 8), writer.pick(3, 4)
    writer.inputs["x"] = f"torch.randn({batch}, {length}, {features}, generator=g)"
    writer.layout, writer.width, writer.length = "BTD", writer.pick(6, 8), length
    writer.example_length = length
    writer.say(f"h = {writer.linear(features, writer.width)}(x)")
    if writer.chance(0.3):
        _mask_input(writer, batch, length, dynamic=False)


def _vectors(writer: Writer, batch: int) -> None:
    features = writer.pick(4, 5)
    batch = writer.batch = batch + writer.pick(0, 2)
    writer.inputs["x"] = f"torch.randn({batch}, {features}, generator=g)"
    writer.layout, writer.width = "BD", writer.pick(6, 8, 12)
    if writer.chance(0.25):
        writer.note("two inputs")
        writer.inputs["z"] = f"torch.randn({batch}, 3, generator=g)"
        writer.say(f"h = {writer.linear(features + 3, writer.width)}(torch.cat([x, z], dim=-1))")
    elif writer.chance(0.25):
        writer.note("categories beside numbers")
        writer.inputs["group"] = f"torch.randint(0, 4, ({batch},), generator=g)"
        table = writer.own("groups", f"nn.Embedding(4, {writer.width})")
        writer.say(f"h = {writer.linear(features, writer.width)}(x) + {table}(group)")
    elif writer.chance(0.25):
        writer.note("bag of embeddings")
        writer.inputs["bag"] = f"torch.randint(0, {TOKENS}, ({batch}, 3), generator=g)"
        table = writer.own("bags", f"nn.Embedding({TOKENS}, {writer.width})")
        writer.say(f"h = {writer.linear(features, writer.width)}(x) + {table}(bag).{writer.pick('mean', 'sum')}(dim=1)")
    else:
        writer.say(f"h = {writer.linear(features, writer.width)}(x)")


def _picture(writer: Writer, batch: int) -> None:
    channels, writer.size = writer.pick(1, 3), 8
    writer.inputs["image"] = f"torch.randn({batch}, {channels}, 8, 8, generator=g)"
    writer.layout, writer.width = "BCHW", writer.pick(4, 8)
    stem = writer.own("stem", f"nn.Conv2d({channels}, {writer.width}, 3, padding=1)")
    writer.say(f"h = {stem}(image)")


def _mask_input(writer: Writer, batch: int, length: int, dynamic: bool) -> None:
    writer.note("boolean mask")
    made = f"torch.arange({length}) < 2 + torch.randint(0, {length - 1}, ({batch}, 1), generator=g)"
    if writer.chance(0.4):
        writer.inputs["mask"] = f"({made}).long()"
        writer.say("kept = mask != 0")
        writer.mask = "kept"
    else:
        writer.inputs["mask"] = made
        writer.mask = "mask"
    if dynamic:
        writer.roles["mask"] = "tokens"


def _extra_vector(writer: Writer, batch: int) -> None:
    writer.note("a vector beside tokens")
    writer.inputs["extra"] = f"torch.randn({batch}, 3, generator=g)"
    writer.say(f"h = h + {writer.linear(3, writer.width)}(extra).unsqueeze(1)")


# --- products ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = (
    "F.relu(h)",
    "F.gelu(h)",
    'F.gelu(h, approximate="tanh")',
    "F.silu(h)",
    "F.mish(h)",
    "F.elu(h)",
    "F.selu(h)",
    "F.celu(h, 0.7)",
    "F.leaky_relu(h, 0.2)",
    "F.hardtanh(h)",
    "F.relu6(h)",
    "F.hardswish(h)",
    "F.hardsigmoid(h)",
    "F.softplus(h, beta=2)",
    "F.threshold(h, 0.1, -0.2)",
    "F.logsigmoid(h)",
    "F.softsign(h)",
    "F.tanhshrink(h)",
    "torch.tanh(h)",
    "torch.sigmoid(h)",
    "h * torch.sigmoid(1.7 * h)",
    "h.clamp(min=0).square()",
    "nn.functional.glu(torch.cat([h, h.flip(-1)], dim=-1), dim=-1)",
)


@block("BTD", "BD", weight=2)
def activation(writer: Writer) -> None:
    if writer.chance(0.1):
        writer.say(f"h = {writer.own('slope', f'nn.PReLU({writer.pick(1, 1)})')}(h)")
    else:
        writer.say(f"h = {writer.pick(*ACTIVATIONS)}")


@block("BTD", "BD", weight=3, keeps=False)
def dense(writer: Writer) -> None:
    _dense(writer)


def _dense(writer: Writer) -> None:
    width = writer.pick(6, 8, 12)
    writer.say(f"h = {writer.linear(writer.width, width)}(h)")
    _resize(writer, width)


def _resize(writer: Writer, width: int) -> None:
    if width != writer.width:
        writer.embedding = ""
    writer.width = width


@block("BTD", "BD", weight=3)
def perceptron(writer: Writer) -> None:
    wide = 2 * writer.width
    one, other = writer.linear(writer.width, wide), writer.linear(wide, writer.width)
    made = writer.pick(*ACTIVATIONS).replace("(h", f"({one}(h)", 1)
    if made.startswith(("h *", "h.")) or "cat" in made:
        made = f"F.silu({one}(h))"
    writer.say(f"h = {other}({made})")


@block("BTD", "BD")
def gated(writer: Writer) -> None:
    one, other = (writer.linear(writer.width, writer.width) for _ in range(2))
    writer.say(f"h = {one}(h) * {writer.pick('torch.sigmoid', 'F.silu', 'torch.tanh')}({other}(h))")


@block("BTD", "BD", weight=2, keeps=False)
def products(writer: Writer) -> None:
    width = writer.pick(6, 8)
    weight = writer.parameter(writer.width, width)
    ways = [f"h @ {weight}", f"torch.matmul(h, {weight})", f"torch.einsum('...d,de->...e', h, {weight})"]
    if writer.layout == "BD":
        bias = writer.parameter(width, stem="bias")
        ways += [
            f"torch.addmm({bias}, h, {weight})",
            f"torch.mm(h, {weight})",
            f"F.linear(h, {weight}.t(), {bias})",
            f"torch.einsum('bd,de->be', h, {weight}.tanh())",
        ]
    else:
        ways += [
            f"torch.bmm(h, {weight}.expand(h.shape[0], -1, -1))",
            f"torch.baddbmm(torch.zeros(1, 1, 1), h, {weight}.expand(h.shape[0], -1, -1), beta=0.5)",
            f"F.linear(h, {weight}.transpose(0, 1))",
        ]
    writer.say(f"h = {writer.pick(*ways)}")
    _resize(writer, width)


@block("BTD", "BD")
def bilinear_forms(writer: Writer) -> None:
    vector = writer.parameter(writer.width, stem="vector")
    ways = [
        f"h + (h @ {vector}).unsqueeze(-1) * {vector}",
        f"h + torch.einsum('...d,d,e->...e', h, {vector}, {vector})",
    ]
    if writer.layout == "BD":
        ways += [
            f"h + torch.outer(torch.mv(h, {vector}), {vector})",
            f"h * torch.dot({vector}, {vector})",
            "h + torch.einsum('bi,bj->bij', h, h).mean(-1)",
        ]
    writer.say(f"h = {writer.pick(*ways)}")


@block("BTD", "BD")
def scales(writer: Writer) -> None:
    way = writer.pick("scalar", "vector", "list", "dict")
    if way == "scalar":
        writer.say(f"h = h * (1 + torch.tanh({writer.own('gate', 'nn.Parameter(torch.tensor(0.3))')}))")
    elif way == "vector":
        writer.say(f"h = h * {writer.own('scale', f'nn.Parameter(torch.ones({writer.width}) * 0.9)')}")
    elif way == "list":
        name = writer.own(
            "several", f"nn.ParameterList([torch.full(({writer.width},), 0.1 * k + 0.8) for k in range(2)])"
        )
        writer.say(f"for each in {name}:", "    h = h * each")
    else:
        name = writer.own("named", f'nn.ParameterDict({{"a": torch.ones({writer.width}), "b": torch.zeros(1)}})')
        writer.say(f'h = h * {name}["a"] + {name}["b"]')


@block("BTD", "BD", weight=2)
def residual(writer: Writer) -> None:
    before = writer.name("before")
    writer.say(f"{before} = h")
    for _ in range(writer.pick(1, 2)):
        add_block(writer, keeping=True)
    ways = [f"{before} + h", f"{before} + 0.5 * h", f"torch.add({before}, h, alpha=0.3)", f"h.add({before})"]
    writer.say(f"h = {writer.pick(*ways)}")


# --- arithmetic -------------------------------------------------------------------------------------------------------

POINTWISE = (
    "h + 0.3 * torch.sin(h) - 0.1 * torch.cos(h)",
    "h + 0.1 * torch.exp(-h.abs())",
    "h + 0.2 * torch.log1p(h.square())",
    "h / torch.sqrt(h.square() + 1)",
    "h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 0.1)",
    "h * torch.reciprocal(1 + h.abs())",
    "h + 0.2 * torch.erf(h)",
    "h + 0.2 * torch.atan(h) - 0.1 * torch.asin(0.9 * torch.tanh(h)) + 0.1 * torch.acos(0.5 * torch.tanh(h))",
    "torch.sinh(h.clamp(-1, 1)) + 0.1 * torch.cosh(h.clamp(-1, 1))",
    "h + 0.1 * torch.expm1(h.clamp(max=1.0))",
    "h + 0.1 * torch.tan(0.3 * torch.tanh(h))",
    "torch.maximum(h, 0.5 * h) + torch.minimum(h, torch.ones_like(h))",
    "torch.max(h, h.roll(1, -1))",
    "torch.min(h, -h) + h",
    "h + 0.1 * torch.atan2(h, torch.full_like(h, 2.0))",
    "h + 0.1 * torch.logaddexp(h, -h)",
    "torch.lerp(h, h.flip(-1), 0.25)",
    "torch.lerp(h, torch.zeros_like(h), torch.sigmoid(h))",
    "torch.addcmul(h, h, h.detach(), value=0.05)",
    "torch.addcdiv(h, h, 1 + h.square(), value=0.1)",
    "torch.where(h > 0, h, 0.1 * h)",
    "torch.where(h.abs() < 1, h, 1.0)",
    "h.masked_fill(h < -1, -1.0)",
    "h + 0.1 * torch.remainder(h, 1.5)",
    "h + 0.1 * torch.fmod(h, 1.5)",
    "torch.nan_to_num(h, nan=0.0)",
    "h + 0.1 * torch.sign(h) + 0.05 * h.floor() - 0.05 * h.ceil()",
    "h + (h.round() - h).detach() * 0.1",
    "h + 0.1 * h.trunc()",
    "1.0 - h",
    "2 / (2 + h.square())",
    "h ** 3 * 0.1 + h",
    "2.0 ** (0.1 * h) + h",
    "(h.abs() + 1) ** (0.5 * torch.sigmoid(h))",
    "h + 0.1 * torch.log(1 + h.abs()) + 0.1 * torch.log2(2 + h.abs())",
    "h.clamp(torch.tensor(-1.5), torch.tensor(1.5))",
    "h + 0.1 * (h > 0).float() * (h < 1)",
    "h + 0.1 * torch.logical_and(h > 0, h < 1).to(h.dtype)",
    "h + 0.1 * ((h > 0) | (h < -1)).to(torch.float32) - 0.1 * ((h > 0) & ~(h > 1)).float()",
    "h + 0.05 * torch.isfinite(h).float() + torch.isnan(h) * 1.0",
    "h - h.detach() * 0.1",
    "h.neg().abs() + h",
    "(h.double() * 0.5).float() + h",
    "h.to(torch.float64).tanh().to(h.dtype)",
    "h + 0.1 * torch.floor_divide(h.detach(), 0.7)",
    "h + 0.1 * torch.div(h, 0.7, rounding_mode='floor')",
    "h + 0.1 * (h.detach() * 10).long().remainder(3).float()",
    "h + 0.1 * torch.logical_or(h > 1, h < -1).float() + 0.1 * torch.logical_xor(h > 0, torch.logical_not(h > 1))",
    "h + 0.1 * ((h > 0) ^ (h > 1)).float()",
    "h + 0.1 * torch.bitwise_and(h > 0, h < 1) - 0.1 * torch.bitwise_or(h > 1, h < 0)",
    "h + 0.1 * torch.bitwise_xor(h > 0, h < 1)",
    "h + 0.1 * ((h.detach() * 8).int() & 3).float() + 0.1 * torch.bitwise_not(h > 0)",
    "h + 0.01 * ((h.detach() * 8).long() | 1)",
    "h + 0.1 * (h >= 0.3).float() + 0.1 * (h <= -0.3) - 0.1 * (h != 0)",
    "h + 0.1 * (h >= h.flip(-1)).float() + 0.1 * (h <= 0.5 * h) - 0.1 * (h < h.roll(1, -1)) + 0.1 * (h != h.abs())",
    "torch.clamp_max(torch.clamp_min(h, -2.0), 2.0)",
    "torch.where(h > 0, 0.9, 1.1) * h",
    "torch.where(h > 1, 1.0, h)",
    "h.masked_fill(h > 1, torch.tensor(1.0))",
    "torch.rsub(h, 0.5 * h.detach())",
    "h.sub(0.1).add(0.2).mul(1.1).div(1.2)",
    "h / 1.1 + torch.isinf(h).float()",
    "torch.positive(h).type_as(h).to(h).to(h.device)",
    "h + 0.1 * torch.full((h.shape[-1],), 0.7).remainder(h.detach().abs() + 1)",
    "2 * h.detach() - h + 2 * (h - h.detach())",
)


@block("BTD", "BD", weight=4)
def pointwise(writer: Writer) -> None:
    for _ in range(writer.pick(1, 2, 3)):
        writer.say(f"h = {writer.pick(*POINTWISE)}")


REDUCING = (
    "h - h.mean(-1, keepdim=True)",
    "h - 0.1 * h.sum(dim=-1, keepdim=True)",
    "h / (h.std(-1, keepdim=True) + 0.5)",
    "h / (1 + h.var(-1, keepdim=True, unbiased=False))",
    "h / (1 + h.var(-1, keepdim=True))",
    "h - 0.1 * h.amax(-1, keepdim=True) + 0.1 * h.amin(dim=-1, keepdim=True)",
    "h - 0.1 * h.max(-1, keepdim=True).values",
    "h - 0.1 * h.min(dim=-1, keepdim=True)[0]",
    "h - 0.3 * h.logsumexp(-1, keepdim=True)",
    "h / (1 + h.norm(dim=-1, keepdim=True))",
    "h / (1 + torch.linalg.vector_norm(h, dim=-1, keepdim=True))",
    "F.normalize(h, dim=-1)",
    "h + 0.1 * torch.tanh(h).prod(-1, keepdim=True)",
    "h * h.softmax(-1) * h.shape[-1]",
    "h + 0.1 * F.log_softmax(h, dim=-1)",
    "h.cumsum(-1) / h.shape[-1]",
    "h + 0.1 * torch.cumprod(torch.tanh(h), dim=-1)",
    "h.sort(-1).values + h",
    "h + 0.2 * h.topk(2, dim=-1).values.mean(-1, keepdim=True)",
    "h + 0.1 * (h == h.amax(-1, keepdim=True)).float()",
    "h + 0.1 * h.argmax(-1, keepdim=True).float()",
    "h + 0.1 * F.one_hot(h.argmax(-1), h.shape[-1]).float()",
    "h.gather(-1, h.argsort(-1, descending=True)) + h",
    "h + 0.1 * (h > 0).any(-1, keepdim=True).float() - 0.1 * (h > 0).all(-1, keepdim=True).float()",
    "h + 0.1 * h.argmin(-1, keepdim=True).float()",
    "h / (1 + h.var(dim=-1, correction=0, keepdim=True) + h.std(dim=-1, correction=1, keepdim=True))",
    "h + 0.1 * torch.count_nonzero(h > 0, dim=-1).unsqueeze(-1)",
    "h + 0.1 * torch.sort(h, dim=-1, stable=True).values",
    "h + 0.1 * h.norm(p=1, dim=-1, keepdim=True).reciprocal()",
    "h / (1 + h.norm())",
    "h - 0.1 * h.min()",
    "h + 0.01 * torch.tanh(h).prod()",
    "h * (1 + 0.1 * (h > 0).any()) - 0.1 * (h < 9).all()",
    "h / (1 + h.abs().mean())",
    "h / (1 + h.square().sum().sqrt())",
    "h - h.abs().max() * 0.1",
    "h - h.var() * 0.05",
)


@block("BTD", "BD", weight=3)
def reducing(writer: Writer) -> None:
    for _ in range(writer.pick(1, 2)):
        chosen = writer.pick(*REDUCING)
        if chosen in REDUCING[-8:]:
            writer.coupled = True
            writer.note("over the whole microbatch")
        writer.say(f"h = {chosen}")


@block("BTD", "BD", weight=0.3)
def statistics(writer: Writer) -> None:
    writer.say(
        "spread, centre = torch.var_mean(h, dim=-1, keepdim=True)",
        "h = (h - centre) * torch.rsqrt(spread + 0.1)",
    )


@block("BTD", "BD", weight=0.4)
def centred_over_the_batch(writer: Writer) -> None:
    writer.coupled = True
    writer.say(f"h = h - {writer.pick('0.5 * h.mean(0)', 'h.mean(dim=0, keepdim=True)', '0.1 * h.sum(0)')}")


# --- norms ------------------------------------------------------------------------------------------------------------


@block("BTD", "BD", weight=3)
def normed(writer: Writer) -> None:
    width = writer.width
    choices = [
        f"nn.LayerNorm({width})",
        f"nn.LayerNorm({width}, elementwise_affine=False)",
        f"nn.LayerNorm({width}, bias=False)",
        f"nn.RMSNorm({width})",
        f"nn.RMSNorm({width}, eps=1e-3, elementwise_affine=False)",
    ]
    writer.say(f"h = {writer.own('norm', writer.pick(*choices))}(h)")


@block("BTD", "BD", weight=2)
def channel_norm(writer: Writer) -> None:
    width = writer.width
    options = writer.pick("", "", "", ", momentum=0.3", ", affine=False", ", track_running_stats=False", ", eps=1e-2")
    choices = [f"nn.BatchNorm1d({width}{options})"] * 3 + [f"nn.GroupNorm(2, {width})"]
    if writer.layout == "BTD":
        choices += [
            f"nn.InstanceNorm1d({width})",
            f"nn.InstanceNorm1d({width}, affine=True)",
            f"nn.InstanceNorm1d({width}, track_running_stats=True)",
        ]
    chosen = writer.pick(*choices)
    writer.coupled |= "Batch" in chosen or "track_running_stats=True" in chosen
    writer.note(chosen.split("(")[0])
    if "=" in chosen:
        writer.note(f"{chosen.split('(')[0]} with {chosen.split(', ')[-1].strip(')')}")
    norm = writer.own("norm", chosen)
    if "Batch" in chosen and writer.chance(0.1):
        writer.note("batch norm that always evaluates")
        writer.init.append(f"{norm}.eval()")
        writer.init.append(f"{norm}.train = lambda mode=True: {norm}")
    writer.say(f"h = {norm}(h)" if writer.layout == "BD" else f"h = {norm}(h.transpose(1, 2)).transpose(1, 2)")


# --- moving data ------------------------------------------------------------------------------------------------------

MOVES = (
    "torch.cat([h[..., 1:], h[..., :1].tanh()], dim=-1)",
    "torch.cat(h.chunk(2, dim=-1)[::-1], dim=-1)",
    "torch.cat([h.split(h.shape[-1] // 2, dim=-1)[0].tanh(), h.split(h.shape[-1] // 2, dim=-1)[1]], dim=-1)",
    "torch.stack([h, h.tanh()], dim=-1).mean(-1)",
    "torch.stack(h.unbind(-1)[::-1], dim=-1)",
    "sum(torch.tensor_split(h, 2, dim=-1)).repeat_interleave(2, dim=-1)",
    "h.roll(1, -1)",
    "h.flip(-1)",
    "F.pad(h, (1, 0))[..., :-1]",
    "F.pad(h, (0, 1), value=0.5)[..., 1:]",
    "h.narrow(-1, 0, h.shape[-1] // 2).repeat_interleave(2, -1)",
    "h.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)",
    "h.unflatten(-1, (2, -1)).swapaxes(-1, -2).reshape(h.shape)",
    "h.unflatten(-1, (2, -1)).movedim(-1, -2).reshape_as(h)",
    "h[..., ::2].repeat_interleave(2, dim=-1)",
    "h.view(*h.shape[:-1], 2, -1).mT.reshape(h.shape)",
    "h.unsqueeze(-1).expand(*h.shape, 2).mean(-1)",
    "h.unsqueeze(0).squeeze(0)",
    "h + h[..., 0].unsqueeze(-1)",
    "h + h.select(-1, 1).unsqueeze(-1).expand_as(h) * 0.3",
    "h + h[..., -1:].broadcast_to(h.shape) * 0.3",
    "h.contiguous().view_as(h).clone()",
    "torch.hstack([h, h])[..., : h.shape[-1]] if h.dim() == 2 else h.flip(1).flip(1)",
    "torch.tril(torch.ones(h.shape[-1], h.shape[-1])).matmul(h.unsqueeze(-1)).squeeze(-1) / h.shape[-1]",
    "h @ torch.eye(h.shape[-1]) + (h.unsqueeze(-1) * h.unsqueeze(-2)).triu().sum(-1) * 0.1",
    "h.new_ones(h.shape[-1]) * h + h.new_full((1,), 0.1) + h.new_zeros(1)",
    "h + torch.linspace(0, 1, h.shape[-1])",
    "h.index_fill(-1, torch.tensor([0, 2]), 0.5)",
    "h.scatter(-1, torch.zeros_like(h[..., :1], dtype=torch.long), 0.5)",
    "torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h)",
    "torch.slice_scatter(h, h[..., :2].tanh(), dim=-1, start=1, end=3)",
    "torch.select_scatter(h, h[..., 1].tanh(), -1, 0)",
    "h.masked_scatter(h > 10, h.flatten())",
    "torch.cat([h[..., :2] * 2, h[..., 2:]], dim=-1)",
    "h[..., torch.arange(h.shape[-1] - 1, -1, -1)]",
    "h.movedim((0, -1), (-1, 0)).movedim((0, -1), (-1, 0))",
    "h.unsqueeze(0).squeeze((0,))",
    "h.repeat(*[1] * (h.dim() - 1), 2)[..., : h.shape[-1]]",
    "torch.vstack([h, h.tanh()])[: h.shape[0]]",
    "h.swapdims(0, -1).swapdims(0, -1)",
    "h + 0.1 * torch.diagonal(h.unsqueeze(-1) * h.unsqueeze(-2), dim1=-2, dim2=-1)",
    "torch.cat([h.unfold(-1, 2, 1).mean(-1), h[..., :1]], dim=-1)",
    "h + torch.zeros(1) + torch.arange(1, h.shape[-1] + 1) * 0.1 - torch.arange(0, 2 * h.shape[-1], 2) * 0.05",
    "h + 0.1 * torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), h.detach()).float()",
    "torch.cat(h.split([2, h.shape[-1] - 2], dim=-1)[::-1], dim=-1)",
    "h * torch.eye(h.shape[-1])[torch.tril_indices(h.shape[-1], h.shape[-1])[0][: h.shape[-1]]].sum(0) + h",
    "F.pad(h.unsqueeze(0), (1, 1), mode='reflect').squeeze(0)[..., 1:-1] if h.dim() == 2 else h",
    "h.mT.contiguous().mT",
    "h.T.T if h.dim() == 2 else h",
)


@block("BTD", "BD", weight=4)
def moving(writer: Writer) -> None:
    for _ in range(writer.pick(1, 2)):
        writer.say(f"h = {writer.pick(*MOVES)}")


@block("BTD", "BD", weight=2)
def indexing(writer: Writer) -> None:
    order = list(range(writer.width))
    writer.draw.shuffle(order)
    held = writer.buffer(f"torch.tensor({order})", stem="order", persistent=writer.chance(0.7))
    ways = [
        f"h[..., {held}]",
        f"h.index_select(-1, {held})",
        f"h.gather(-1, {held}.expand(h.shape))",
        f"torch.zeros_like(h).index_add(-1, {held}, h)",
        f"h.index_add(-1, {held}, h, alpha=0.3)",
        f"h.index_copy(-1, {held}, h.tanh())",
        f"torch.zeros_like(h).scatter(-1, {held}.expand(h.shape), h)",
        f"h.scatter_reduce(-1, {held}.expand(h.shape), h.tanh(), reduce='mean')",
        f"h + F.embedding({held} % {writer.width}, {writer.parameter(writer.width, writer.width)}).mean(0)",
        f"h * torch.bucketize(h.detach(), torch.tensor([-1.0, 0.0, 1.0])).float() * 0.3 + h[..., {held}]",
    ]
    if writer.layout == "BD" or writer.length is not None:
        ways.append(f"torch.take_along_dim(h, {held}.expand(h.shape), dim=-1)")
    writer.say(f"h = {writer.pick(*ways)}")


# --- weights that are shared, frozen, or used oddly -------------------------------------------------------------------


@block("BTD", "BD", weight=2)
def used_twice(writer: Writer) -> None:
    layer = writer.linear(writer.width, writer.width)
    if writer.chance(0.3):
        writer.say(f"h = {layer}(torch.tanh({layer}(h)))")
        return
    writer.say(f"h = torch.tanh({layer}(h))")
    for _ in range(writer.pick(1, 2)):
        add_block(writer, keeping=True)
    writer.say(f"h = h + {layer}(h)")


@block("BTD", "BD", weight=2)
def tied(writer: Writer) -> None:
    one = writer.linear(writer.width, writer.width)
    way = writer.pick("same", "transposed", "earlier", "submodule")
    if way == "same":
        other = writer.linear(writer.width, writer.width)
        writer.init.append(f"{other}.weight = {one}.weight")
        writer.say(f"h = torch.tanh({one}(h))")
        add_block(writer, keeping=True)
        writer.say(f"h = {other}(h)")
    elif way == "transposed":
        writer.say(f"h = torch.tanh({one}(h))")
        add_block(writer, keeping=True)
        writer.say(f"h = F.linear(h, {one}.weight.{writer.pick('t()', 'T', 'transpose(0, 1)')})")
    elif way == "earlier" and any(shape == [writer.width] * 2 for _, *shape in writer.linears[:-1]):
        name = next(name for name, *shape in writer.linears if shape == [writer.width] * 2)
        writer.say(f"h = F.linear(torch.tanh({one}(h)), {name}.weight)")
    else:
        kept = writer.own("again", f"nn.ModuleList([{one}, nn.Tanh(), {one}])")
        writer.say(f"for each in {kept}:", "    h = each(h)")


@block("BTD", "BD", weight=1.5)
def frozen(writer: Writer) -> None:
    layer = writer.linear(writer.width, writer.width, bias=True)
    way = writer.pick("weight", "all", "detached", "no_grad")
    if way == "weight":
        writer.init.append(f"{layer}.weight.requires_grad_(False)")
    elif way == "all":
        writer.init.append(f"{layer}.requires_grad_(False)")
    if way == "detached":
        writer.say(f"h = h + F.linear(h, {layer}.weight.detach(), {layer}.bias)")
    elif way == "no_grad":
        writer.say("with torch.no_grad():", f"    still = {layer}(h)", "h = h + 0.3 * still")
    else:
        writer.say(f"h = h + {layer}(h)")


@block("BTD", "BD", weight=0.7)
def low_rank(writer: Writer) -> None:
    layer = writer.linear(writer.width, writer.width)
    writer.init.append(f"{layer}.requires_grad_(False)")
    one, other = writer.parameter(writer.width, 2), writer.parameter(2, writer.width)
    writer.say(f"h = {layer}(h) + 2.0 * (h @ {one}) @ {other}")


@block("BTD", "BD", weight=0.25)
def reparametrised(writer: Writer) -> None:
    layer = writer.pick(
        f"nn.utils.parametrizations.weight_norm(nn.Linear({writer.width}, {writer.width}))",
        f"nn.utils.parametrizations.spectral_norm(nn.Linear({writer.width}, {writer.width}))",
        f"nn.utils.weight_norm(nn.Linear({writer.width}, {writer.width}))",
    )
    writer.note(layer.split("(")[0])
    writer.coupled |= "spectral" in layer
    writer.say(f"h = {writer.own('layer', layer)}(h)")


@block("BTD", "BD", weight=0.8)
def experts(writer: Writer) -> None:
    layers = writer.own("experts", f"nn.ModuleList([nn.Linear({writer.width}, {writer.width}) for _ in range(3)])")
    router = writer.linear(writer.width, 3)
    if writer.chance(0.5):
        writer.say(f"share = {router}(h).softmax(-1)")
    else:
        writer.say(
            f"scores = {router}(h).softmax(-1)",
            "best, which = scores.topk(2, dim=-1)",
            "share = torch.zeros_like(scores).scatter(-1, which, best / best.sum(-1, keepdim=True))",
        )
    writer.say(f"h = sum(share[..., k : k + 1] * {layers}[k](h) for k in range(3))")


@block("BTD", "BD", weight=2)
def deep(writer: Writer) -> None:
    """A list of layers that are nearly equal, such as a capture traces once."""
    width, count = writer.width, writer.pick(5, 6)
    norms = [f"nn.LayerNorm({width})", "nn.Tanh()", "nn.Dropout(0.0)"]
    if writer.layout == "BD":
        norms.append(f"nn.BatchNorm1d({width})")
    norm = writer.pick(*norms)
    writer.coupled |= "Batch" in norm
    layers = writer.own(
        "layers", f"nn.ModuleList([nn.Sequential({norm}, nn.Linear({width}, {width})) for _ in range({count})])"
    )
    change = writer.pick("none", "none", "frozen", "shared", "evaluating", "bias", "other")
    writer.init += {
        "none": [],
        "frozen": [f"{layers}[:4].requires_grad_(False)"],
        "shared": [f"{layers}[4][1].weight = {layers}[1][1].weight"],
        "evaluating": [f"{layers}[4].eval()"],
        "bias": [f"{layers}[4][1].bias = None"],
        "other": [f"{layers}[4][0] = nn.Identity()"],
    }[change]
    way = writer.pick("plain", "residual", "numbered", "parity", "counted", "late", "kept", "skips", "weighted")
    writer.note(f"deep: {change}, {way}")
    loop = f"for number, layer in enumerate({layers}):"
    writer.say(
        *{
            "plain": [loop, "    h = layer(h)"],
            "residual": [loop, "    h = h + 0.3 * layer(h)"],
            "numbered": [loop, "    h = h + layer(h) / (number + 2)"],
            "parity": [loop, "    h = h + 0.3 * layer(h) if number % 2 else torch.tanh(layer(h))"],
            "counted": [loop, f"    h = h + layer(h) / len({layers})"],
            "late": [loop, "    h = h + 0.3 * layer(h)", "    if number == 4:", "        h = 0.5 * h"],
            "kept": [
                "kept_all = []",
                loop,
                "    h = torch.tanh(layer(h))",
                "    kept_all.append(h)",
                "h = sum(kept_all)",
            ],
            "skips": ["first = h", loop, "    h = torch.tanh(layer(h)) + 0.1 * first"],
            "weighted": [
                f"amounts = {writer.parameter(count)}.softmax(0)",
                loop,
                "    h = h + amounts[number] * layer(h)",
            ],
        }[way]
    )


@block("BTD", "BD", weight=0.5)
def checkpointed(writer: Writer) -> None:
    layer = writer.linear(writer.width, writer.width)
    writer.say(f"h = h + torch.utils.checkpoint.checkpoint({layer}, h, use_reentrant=False)")


@block("BTD", "BD", weight=2)
def in_place(writer: Writer) -> None:
    activation = writer.own(
        "activation", f"nn.{writer.pick('ReLU', 'SiLU', 'Hardswish', 'ReLU6', 'ELU')}(inplace=True)"
    )
    writer.say(
        *writer.pick(
            [f"h = {activation}(1.1 * h)"],
            ["h = F.relu(h + 0.3, inplace=True)"],
            ["h = h * 1.1", "h += 0.1"],
            ["h = h.clone()", "h.mul_(0.9).add_(0.1)"],
            ["h = h + 0.1", "h.clamp_(-2, 2)"],
            ["h = h + 0.1", "h -= h.detach().mean(-1, keepdim=True)", "h *= 1.1"],
            ["h = h.clone()", "h[h > 1] = 1.0"],
            ["h = (1.1 * h).masked_fill_(h > 1, 1.0)"],
            ["made = torch.zeros_like(h)", "made += h", "h = made / 1.1"],
            ["h = h.clone()", "h.div_(1.2).sub_(0.1).tanh_()"],
            ["h = h.clone()", "h[..., 0] = 0.5"],
        )
    )


@block("BTD", "BD", weight=0.3)
def library(writer: Writer) -> None:
    """Parts of torch.nn that are rarer."""
    width = writer.width
    made = writer.pick(
        f"nn.Bilinear({width}, {width}, {width})",
        "nn.AlphaDropout(0.0)",
        "nn.Softmax(dim=-1)",
        "nn.Identity()",
        "nn.Hardshrink()",
        "nn.Softshrink()",
        "nn.RReLU(0.1, 0.1)",
        "nn.PairwiseDistance(keepdim=True)",
    )
    writer.note(made.split("(")[0])
    layer = writer.own("part", made)
    both = "Bilinear" in made or "Distance" in made
    writer.say(f"h = h + {layer}(h, h.flip(-1))" if both else f"h = h + {layer}(h)")


# --- state ------------------------------------------------------------------------------------------------------------


@block("BTD", "BD", weight=1.5)
def buffers_read(writer: Writer) -> None:
    persistent = writer.chance(0.6)
    held = writer.buffer(f"torch.linspace(0.5, 1.5, {writer.width})", persistent=persistent)
    writer.say(f"h = {writer.pick(f'h * {held}', f'h + {held}', f'torch.where({held} > 1, h, 0.5 * h)')}")


@block("BTD", "BD", weight=1.5)
def buffers_written(writer: Writer) -> None:
    """A running mean, in the ways that people write it, read before or after the update."""
    writer.coupled = True
    mean = writer.buffer(f"torch.zeros({writer.width})", stem="mean")
    over = "0" if writer.layout == "BD" else "(0, 1)"
    writer.say(f"now = h.detach().mean({over})")
    way = writer.pick("mul_add", "copy", "reassigned", "reassigned", "lerp", "data", "sub", "index", "no_grad")
    writer.note(f"running mean: {way}")
    lines = {
        "mul_add": [f"{mean}.mul_(0.9).add_(0.1 * now)"],
        "copy": [f"{mean}.copy_(0.9 * {mean} + 0.1 * now)"],
        "reassigned": [f"{mean} = 0.9 * {mean} + 0.1 * now"],
        "lerp": [f"{mean}.lerp_(now, 0.1)"],
        "data": [f"{mean}.data.mul_(0.9)", f"{mean}.data += 0.1 * now"],
        "sub": [f"{mean} -= 0.1 * ({mean} - now)"],
        "index": [f"{mean}[:2] = now[:2]"],
        "no_grad": ["with torch.no_grad():", f"    {mean} *= 0.9", f"    {mean} += 0.1 * now"],
    }[way]
    if writer.chance(0.5):
        writer.note("written only in training")
        lines = ["if self.training:", *(f"    {line}" for line in lines)]
    reading = writer.pick(f"h = h - {mean}", f"h = h * (1 + {mean})", f"h = h / (1 + {mean}.square())", "")
    writer.say(*((reading, *lines) if writer.chance(0.4) else (*lines, reading)))


@block("BTD", "BD", weight=1)
def counters(writer: Writer) -> None:
    writer.coupled = True
    way = writer.pick("in place", "added", "reassigned", "reassigned", "attribute")
    writer.note(f"counter: {way}")
    if way == "attribute":
        name = writer.own("calls", "0")
        writer.say(f"{name} += 1", f"h = h * (1 + 0.1 / {name})" if writer.chance(0.7) else "")
        return
    dtype = writer.pick("torch.tensor(0)", "torch.tensor(0.0)", "torch.zeros(1)")
    name = writer.buffer(dtype, stem="seen", persistent=writer.chance(0.8))
    update = {"in place": f"{name}.add_(1)", "added": f"{name} += 1", "reassigned": f"{name} = {name} + 1"}[way]
    if writer.chance(0.4):
        writer.say("if self.training:", f"    {update}")
    else:
        writer.say(update)
    if writer.chance(0.7):
        writer.say(f"h = h * (1 + 0.1 / (1 + {name}))")


@block("BTD", "BD", weight=0.5)
def last_seen(writer: Writer) -> None:
    """What one microbatch leaves for the next."""
    writer.coupled = True
    held = writer.buffer(f"torch.zeros({writer.width})", stem="last")
    seen = "h.detach()[-1]" if writer.layout == "BD" else "h.detach()[-1, -1]"
    update = writer.pick(f"{held} = {seen}", f"{held}.copy_({seen})", f"{held} = {seen}.clone()")
    writer.say(f"then = h + 0.1 * {held}", update, "h = then")


@block("BTD", "BD", weight=1.5)
def modes(writer: Writer) -> None:
    """Something else in training than in evaluation."""
    layer = writer.linear(writer.width, writer.width)
    writer.say(
        *writer.pick(
            ("if self.training:", "    h = h * 1.25"),
            ("if not self.training:", "    h = h + 0.5"),
            ("if self.training:", f"    h = torch.tanh({layer}(h))", "else:", f"    h = 0.9 * {layer}(h)"),
            (f"h = {layer}(h) if self.training else h",),
            ("h = h + 0.1 * float(self.training)",),
            ("h = F.dropout(h, 0.0, self.training)", "h = h * (1.0 if self.training else 0.5)"),
        )
    )


@block("BTD", "BD", weight=0.7)
def idle_dropout(writer: Writer) -> None:
    writer.say(f"h = {writer.own('dropout', f'nn.Dropout({writer.pick(0.0, 0.0)})')}(h)")


# --- sequences --------------------------------------------------------------------------------------------------------


def _allowed(writer: Writer) -> tuple[str, str]:
    """Return a mask of attention as lines before, and as arguments of scaled_dot_product_attention."""
    ways = ["none", "causal", "causal", "lower", "added"]
    if writer.mask:
        ways += ["input"] * 3
    way = writer.pick(*ways)
    writer.note(f"attention mask: {way}")
    return {
        "none": ("", ""),
        "causal": ("", ", is_causal=True"),
        "lower": ("near = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()", ", attn_mask=near"),
        "added": (
            "far = -0.5 * (torch.arange(h.shape[1])[:, None] - torch.arange(h.shape[1])[None, :]).abs().float()",
            ", attn_mask=far",
        ),
        "input": (f"near = {writer.mask}[:, None, None, :]", ", attn_mask=near"),
    }[way]


@block("BTD", weight=4)
def attention(writer: Writer) -> None:
    heads, width = 2, 4
    groups = writer.pick(2, 2, 1)
    q = writer.linear(writer.width, heads * width)
    k, v = (writer.linear(writer.width, groups * width) for _ in range(2))
    o = writer.linear(heads * width, writer.width)
    before, arguments = _allowed(writer)
    if groups == 1:
        writer.note("grouped queries")
        arguments += ", enable_gqa=True"
    if writer.chance(0.2):
        arguments += ", scale=0.3"
    writer.say(
        f"q = {q}(h).unflatten(-1, ({heads}, {width})).transpose(1, 2)",
        f"k = {k}(h).unflatten(-1, ({groups}, {width})).transpose(1, 2)",
        f"v = {v}(h).view(h.shape[0], -1, {groups}, {width}).transpose(1, 2)",
    )
    if writer.chance(0.3):
        writer.note("rotary positions")
        writer.say(
            "angle = torch.arange(h.shape[1])[:, None] * torch.tensor([1.0, 0.1])",
            "turn, lift = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)",
            "q = q * turn + torch.cat([-q[..., 2:], q[..., :2]], -1) * lift",
            "k = k * turn + torch.cat([-k[..., 2:], k[..., :2]], -1) * lift",
        )
    writer.say(*filter(None, (before,)))
    writer.say(
        f"mixed = F.scaled_dot_product_attention(q, k, v{arguments})",
        f"h = h + {o}(mixed.transpose(1, 2).reshape(h.shape[0], -1, {heads * width}))",
    )


@block("BTD", weight=2)
def plain_attention(writer: Writer) -> None:
    q, k, v = (writer.linear(writer.width, writer.width) for _ in range(3))
    scores = writer.pick(
        f"{q}(h) @ {k}(h).transpose(1, 2) / math.sqrt(h.shape[-1])",
        f"torch.einsum('btd,bsd->bts', {q}(h), {k}(h)) * 0.3",
        f"torch.bmm({q}(h), {k}(h).permute(0, 2, 1)) * 0.3",
    )
    writer.say(f"scores = {scores}")
    if writer.mask and writer.chance(0.6):
        writer.say(f"scores = scores.masked_fill(~{writer.mask}[:, None, :], float('-inf'))")
    elif writer.chance(0.5):
        writer.say("scores = scores + torch.full((h.shape[1], h.shape[1]), float('-inf')).triu(1)")
    writer.say(f"h = h + scores.softmax(dim=-1) @ {v}(h)")


@block("BTD", weight=0.6)
def library_attention(writer: Writer) -> None:
    made = f"nn.MultiheadAttention({writer.width}, 2, batch_first=True)"
    if writer.chance(0.4):
        made = f"nn.TransformerEncoderLayer({writer.width}, 2, 16, dropout=0.0, batch_first=True)"
        writer.note("nn.TransformerEncoderLayer")
        writer.say(f"h = {writer.own('layer', made)}(h)")
    else:
        writer.note("nn.MultiheadAttention")
        writer.say(f"h = h + {writer.own('attention', made)}(h, h, h, need_weights={writer.chance(0.5)})[0]")


@block("BTD", weight=0.1)
def recurrent(writer: Writer) -> None:
    kind = writer.pick("nn.GRU", "nn.LSTM", "nn.RNN")
    writer.note(kind)
    writer.say(f"h = {writer.own('memory', f'{kind}({writer.width}, {writer.width}, batch_first=True)')}(h)[0]")


@block("BTD", weight=2)
def positions(writer: Writer) -> None:
    way = writer.pick("table", "embedding", "waves", "buffer")
    writer.note(f"positions: {way}")
    if way == "table":
        writer.say(f"h = h + {writer.parameter(64, writer.width, stem='places')}[: h.shape[1]]")
    elif way == "embedding":
        table = writer.own("places", f"nn.Embedding(64, {writer.width})")
        writer.say(f"h = h + {table}(torch.arange(h.shape[1], device=h.device))")
    elif way == "waves":
        writer.say(
            "place = torch.arange(h.shape[1], dtype=torch.float32)[:, None]",
            "h = h + torch.sin(place / 10 ** (torch.arange(0, h.shape[2]) / h.shape[2]))",
        )
    else:
        held = writer.buffer("torch.arange(64)", stem="ids", persistent=writer.chance(0.5))
        table = writer.own("places", f"nn.Embedding(64, {writer.width})")
        writer.say(f"h = h + {table}({held}[: h.shape[1]])")


@block("BTD", weight=2)
def convolved(writer: Writer) -> None:
    width = writer.width
    made = writer.pick(
        f"nn.Conv1d({width}, {width}, 3, padding=1)",
        f'nn.Conv1d({width}, {width}, 3, padding="same", bias=False)',
        f"nn.Conv1d({width}, {width}, 3, padding=2, dilation=2, groups=2)",
        f"nn.Conv1d({width}, {width}, 3, padding=1, groups={width})",
        f"nn.Conv1d({width}, {width}, 1)",
        f"nn.ConvTranspose1d({width}, {width}, 3, padding=1)",
    )
    layer = writer.own("convolution", made)
    writer.say(f"h = {writer.pick('h + ', '')}{layer}(h.transpose(1, 2)).transpose(1, 2)")


ALONG = (
    "torch.cat([h[:, :1], h[:, :-1]], dim=1)",
    "F.pad(h, (0, 0, 1, 0))[:, :-1]",
    "h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]",
    "h - h.mean(1, keepdim=True)",
    "h - 0.5 * h[:, 0].unsqueeze(1)",
    "h + h.max(dim=1, keepdim=True).values * 0.3",
    "h.flip(1)",
    "h.roll(1, dims=1)",
    "(torch.tril(torch.ones(h.shape[1], h.shape[1])) / h.shape[1]) @ h",
    "h.transpose(1, 2).softmax(-1).transpose(1, 2) * h",
    "h + F.avg_pool1d(h.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2)",
    "h + F.max_pool1d(h.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2)",
    "h + F.adaptive_avg_pool1d(h.transpose(1, 2), 1).transpose(1, 2)",
    "h.permute(1, 0, 2).tanh().permute(1, 0, 2)",
    "h.index_select(1, torch.arange(h.shape[1] - 1, -1, -1))",
    "h * (torch.arange(h.shape[1]) % 2 == 0).float().unsqueeze(-1) + h",
)


@block("BTD", weight=3)
def along_the_sequence(writer: Writer) -> None:
    if writer.length is not None and writer.chance(0.3):
        layer = writer.linear(writer.length, writer.length)
        writer.say(f"h = h + {layer}(h.transpose(1, 2)).transpose(1, 2)")
    else:
        ways = [each for each in ALONG if writer.length is not None or "max_pool" not in each]
        writer.say(f"h = {writer.pick(*ways)}")


@block("BTD", weight=1.5)
def masked(writer: Writer) -> None:
    if not writer.mask:
        writer.say("h = h.masked_fill((torch.arange(h.shape[1]) == 0)[:, None], 0.0)")
        return
    kept = f"{writer.mask}.unsqueeze(-1)"
    writer.say(
        "h = "
        + writer.pick(
            f"h * {kept}",
            f"torch.where({kept}, h, torch.zeros_like(h))",
            f"h.masked_fill(~{kept}, 0.1)",
            f"h - (h * {kept}).sum(1, keepdim=True) / {kept}.sum(1, keepdim=True).clamp(min=1)",
        )
    )


@block("BTD", weight=0.8, keeps=False)
def pooled(writer: Writer) -> None:
    ways = ["h.mean(1)", "h.mean(dim=1)", "h[:, 0]", "h[:, -1]", "h.amax(1)", "h.sum(1) / h.shape[1]", "h.select(1, 0)"]
    if writer.mask:
        kept = f"{writer.mask}.unsqueeze(-1).float()"
        ways += [f"(h * {kept}).sum(1) / {kept}.sum(1)"] * 3
        ways += [f"h[torch.arange(h.shape[0]), {writer.mask}.sum(1) - 1]"]
    if writer.chance(0.25):
        score = writer.linear(writer.width, 1)
        writer.say(f"h = ({score}(h).softmax(1) * h).sum(1)")
    else:
        writer.say(f"h = {writer.pick(*ways)}")
    writer.layout, writer.mask, writer.embedding = "BD", "", ""


# --- pictures ---------------------------------------------------------------------------------------------------------


@block("BCHW", weight=4, keeps=False)
def convolution(writer: Writer) -> None:
    width = writer.pick(4, 8)
    ways = [
        (f"nn.Conv2d({writer.width}, {width}, 3, padding=1)", 1),
        (f'nn.Conv2d({writer.width}, {width}, 3, padding="same", bias=False)', 1),
        (f"nn.Conv2d({writer.width}, {width}, 1)", 1),
        (f"nn.Conv2d({writer.width}, {width}, 3, padding=2, dilation=2, groups=2)", 1),
        (f"nn.Conv2d({writer.width}, {width}, 3, padding=1, padding_mode={writer.pick('zeros', 'reflect')!r})", 1),
    ]
    if writer.size >= 4:
        ways += [(f"nn.Conv2d({writer.width}, {width}, 3, stride=2, padding=1)", 2)] * 2
    made, by = writer.pick(*ways)
    writer.say(f"h = {writer.own('convolution', made)}(h)")
    writer.width, writer.size = width, writer.size // by
    if writer.chance(0.6):
        writer.say(f"h = {writer.pick('F.relu(h)', 'F.gelu(h)', 'F.leaky_relu(h, 0.1)', 'F.silu(h)', 'F.relu6(h)')}")


@block("BCHW", weight=3)
def picture_norm(writer: Writer) -> None:
    width = writer.width
    chosen = writer.pick(
        f"nn.BatchNorm2d({width})",
        f"nn.BatchNorm2d({width})",
        f"nn.BatchNorm2d({width}, momentum=0.3)",
        f"nn.BatchNorm2d({width}, momentum=None)",
        f"nn.BatchNorm2d({width}, track_running_stats=False)",
        f"nn.GroupNorm(2, {width})",
        f"nn.InstanceNorm2d({width}, affine=True)",
        f"nn.InstanceNorm2d({width}, track_running_stats=True)",
        f"nn.LayerNorm([{width}, {writer.size}, {writer.size}])",
        "nn.Dropout2d(0.0)",
    )
    writer.coupled |= "Batch" in chosen or "track_running_stats=True" in chosen
    writer.note(chosen.split("(")[0] + (" without momentum" if "None" in chosen else ""))
    writer.say(f"h = {writer.own('norm', chosen)}(h)")


@block("BCHW", weight=1)
def squeeze(writer: Writer) -> None:
    layer = writer.linear(writer.width, writer.width)
    mean = writer.pick("h.mean((2, 3))", "F.adaptive_avg_pool2d(h, 1).flatten(1)", "h.flatten(2).mean(-1)")
    writer.say(f"h = h * torch.sigmoid({layer}({mean}))[:, :, None, None]")


@block("BCHW", weight=1.5)
def picture_residual(writer: Writer) -> None:
    width = writer.width
    layer = writer.own("convolution", f"nn.Conv2d({width}, {width}, 3, padding=1)")
    twice = writer.chance(0.3)
    writer.say(f"h = h + F.relu({layer}({f'torch.tanh({layer}(h))' if twice else 'h'}))")


@block("BCHW", weight=2, keeps=False)
def picture_moving(writer: Writer) -> None:
    ways: list[tuple[str, float, float]] = [
        ("h.flip(-1)", 1, 1),
        ("F.pad(h, (1, 0, 1, 0))[:, :, :-1, :-1]", 1, 1),
        ("h.roll((1, 1), (2, 3))", 1, 1),
        ("h.transpose(2, 3)", 1, 1),
        ("torch.cat(h.chunk(2, dim=1)[::-1], dim=1)", 1, 1),
        ("F.softmax(h.flatten(2), -1).view_as(h) * h * 4", 1, 1),
        ("h * h.new_ones(1, 1, h.shape[2], 1)", 1, 1),
        ("h.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)", 1, 1),
        ("h.to(memory_format=torch.channels_last) * 1.1", 1, 1),
    ]
    if writer.size >= 4:
        ways += [
            ("F.max_pool2d(h, 2)", 1, 0.5),
            ("F.avg_pool2d(h, 2)", 1, 0.5),
            ("F.avg_pool2d(h, 3, stride=2, padding=1, count_include_pad=False)", 1, 0.5),
            ("F.max_pool2d(h, 3, stride=2, padding=1)", 1, 0.5),
            ("F.pixel_unshuffle(h, 2)", 4, 0.5),
            ("F.adaptive_avg_pool2d(h, h.shape[-1] // 2)", 1, 0.5),
            ("F.interpolate(h, scale_factor=0.5, mode='nearest')", 1, 0.5),
        ]
    if writer.size <= 4:
        ways += [
            ("F.interpolate(h, scale_factor=2, mode='nearest')", 1, 2),
            ("F.interpolate(h, scale_factor=2, mode='bilinear', align_corners=False)", 1, 2),
        ]
        if writer.width % 4 == 0 and writer.width > 4:
            ways += [("F.pixel_shuffle(h, 2)", 0.25, 2)]
    made, wider, larger = writer.pick(*ways)
    writer.say(f"h = {made}")
    writer.width, writer.size = int(writer.width * wider), int(writer.size * larger)
    if writer.width > 8 or writer.width % 2:
        writer.say(f"h = {writer.own('narrow', f'nn.Conv2d({writer.width}, 8, 1)')}(h)")
        writer.width = 8


@block("BCHW", weight=0.6, keeps=False)
def grown(writer: Writer) -> None:
    if writer.size > 4:
        return
    layer = writer.own("convolution", f"nn.ConvTranspose2d({writer.width}, 4, 2, stride=2)")
    writer.say(f"h = {layer}(h)")
    writer.width, writer.size = 4, 2 * writer.size


@block("BCHW", weight=1, keeps=False)
def patches(writer: Writer) -> None:
    writer.say("h = h.flatten(2).transpose(1, 2)")
    writer.layout, writer.length = "BTD", writer.size**2
    writer.example_length = writer.size**2


@block("BCHW", weight=1, keeps=False)
def picture_pooled(writer: Writer) -> None:
    way = writer.pick("mean", "adaptive", "flat", "max")
    lines = {
        "mean": "h = h.mean(dim=(2, 3))",
        "adaptive": "h = F.adaptive_avg_pool2d(h, (1, 1)).flatten(1)",
        "flat": f"h = {writer.linear(writer.width * writer.size**2, 8)}(torch.flatten(h, 1))" if way == "flat" else "",
        "max": "h = h.amax((2, 3))",
    }
    writer.say(lines[way])
    writer.layout, writer.width = "BD", 8 if way == "flat" else writer.width
