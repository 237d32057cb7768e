"""Heads and losses of random modules, and what a microbatch counts for in the mean of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from random_blocks import CLASSES, TOKENS
from random_modules import Writer

EQUAL = "1.0"
"""Microbatches of one size count alike."""


@dataclass
class Made:
    """The end of a module."""

    arguments: list[str]
    """Of forward."""
    returns: list[str]
    """The last lines of forward."""
    counted: str = EQUAL
    """The expression of `counted(batch)`."""
    function: str = ""
    """The source of `loss(output, labels)`, where the module does not compute it."""


@dataclass
class _Term:
    """One loss of labels."""

    lines: list[str]
    """Compute `loss` from `out` and the labels."""
    counted: str = EQUAL
    labels: list[str] = field(default_factory=list)
    added: bool = False
    """Whether it is a sum: then losses of microbatches are added."""


def add_loss(writer: Writer) -> Made:
    """Add the head, and return what comes after it."""
    term = _term(writer)
    roles = {"labels": "labels", **writer.roles}
    for label in term.labels:
        if label not in roles and writer.chance(0.5):
            writer.roles[label] = roles[label] = "labels"
    counted = "None" if term.added else term.counted
    after: list[str] = []
    # Of a sum there is one for each microbatch, so what does not depend on the data would count once for each.
    if not term.added and writer.chance(0.2):
        after.append(_penalty(writer))
    elif not term.added and counted == EQUAL and writer.layout == "BD" and writer.chance(0.2):
        after.append(f"loss = loss + 0.1 * {writer.pick('h.square().mean()', 'h.abs().mean(dim=-1).mean()')}")
        writer.note("a loss of activations")
    taken = [name for name in writer.inputs if name not in term.labels]
    inside = "self." in "".join(term.lines) or bool(writer.mask) or bool(after)
    if not inside and all(roles.get(label) == "labels" for label in term.labels) and writer.chance(0.3):
        writer.note("loss given as a function")
        [first, *more] = term.labels
        unpacked = [f'{label} = labels["{label}"]' for label in term.labels] if more else [f"{first} = labels"]
        body = "\n".join(f"    {line}" for line in [*unpacked, *term.lines, "return loss"])
        return Made(taken, ["return out"], counted, f"def loss(out, labels):\n{body}")
    returned = writer.pick("return loss", "return loss", "return loss, out", 'return {"loss": loss, "out": out}')
    arguments = [*taken, *term.labels]
    if writer.chance(0.2):
        writer.draw.shuffle(arguments)
    return Made(arguments, [*term.lines, *after, returned], counted)


def _penalty(writer: Writer) -> str:
    writer.note("a penalty on weights")
    layers = [name for name, _, _ in writer.linears]
    if layers and writer.chance(0.7):
        size = writer.pick("square().sum()", "abs().mean()", "norm()")
        return f"loss = loss + 0.01 * {writer.pick(*layers)}.weight.{size}"
    return "loss = loss + 0.01 * sum(each.square().mean() for each in self.parameters() if each.requires_grad)"


def _term(writer: Writer) -> _Term:
    if writer.layout == "BCHW":
        kinds: list[Callable[[Writer], _Term]] = [_pixels, _picture_target]
    elif writer.layout == "BTD":
        kinds = [_token_classes] * 5 + [_sequence_targets, _masked_targets, _manual_tokens]
    else:
        kinds = (
            [_classes] * 4 + [_targets] * 3 + [_binary] * 2 + [_distribution, _cosine, _several, _weighted, _margins]
        )
    chosen = writer.pick(*kinds)
    writer.note(f"loss: {chosen.__name__.strip('_')}")
    return chosen(writer)


def _shape(writer: Writer) -> str:
    """Return the leading axes of the hidden state in a microbatch."""
    return f"{writer.batch}, {writer.example_length}" if writer.layout == "BTD" else f"{writer.batch}"


def _head(writer: Writer, outputs: int) -> None:
    """Make `out` of the hidden state."""
    if outputs == TOKENS and writer.embedding and writer.chance(0.7):
        writer.note("head tied to the embedding")
        if writer.chance(0.5):
            head = writer.linear(writer.width, outputs, bias=writer.chance(0.3))
            writer.init.append(f"{head}.weight = {writer.embedding}.weight")
            writer.say(f"out = {head}(h)")
        else:
            writer.say(
                f"out = {writer.pick(f'F.linear(h, {writer.embedding}.weight)', f'h @ {writer.embedding}.weight.t()')}"
            )
    else:
        writer.say(f"out = {writer.linear(writer.width, outputs)}(h)")


# --- classes ----------------------------------------------------------------------------------------------------------


def _label_input(writer: Writer, shape: str, classes: int, ignored: int | None, name: str) -> None:
    """Add labels, some of which do not count; how many differs from microbatch to microbatch."""
    made = f"torch.randint(0, {classes}, ({shape},), generator=g)"
    if ignored is not None:
        share = f"torch.rand({shape}, generator=g) < (0.15, 0.8, 0.5, 0.3)[index % 4]"
        empty = ", empty=index == 1" if not writer.coupled and writer.chance(0.08) else ""
        if empty:
            writer.note("a microbatch in which no label counts")
        made = f"hidden({made}, {share}, {ignored}, {classes}{empty})"
        writer.note(f"labels of {ignored} do not count")
    writer.inputs[name] = made


def _label_name(writer: Writer, *, language: bool = False) -> str:
    name: str = writer.pick("labels", "labels", "target", "y")
    if language and writer.length is None and name != "labels":
        # The length of the labels must be known to be the tokens'.
        writer.roles[name] = "labels"
    return name


def _cross_entropy(writer: Writer, name: str, classes: int, ignored: int | None) -> tuple[str, str, bool]:
    """Return the further arguments of a cross entropy, what a microbatch counts for, and whether it is a sum."""
    skip = -100 if ignored is None else ignored
    arguments = "" if ignored in (None, -100) else f", ignore_index={ignored}"
    counts = f'float((batch["{name}"] != {skip}).sum())'
    if writer.chance(0.25):
        writer.note("class weights")
        weights = [round(writer.draw.uniform(0.3, 2.0), 2) for _ in range(classes)]
        held = writer.buffer(f"torch.tensor({weights})", stem="weights", persistent=writer.chance(0.5))
        arguments += f", weight={held}"
        counts = f'float(torch.tensor({weights})[batch["{name}"][batch["{name}"] != {skip}]].sum())'
    if writer.chance(0.2):
        writer.note("label smoothing")
        arguments += ", label_smoothing=0.1"
    if writer.chance(0.15):
        writer.note("reduction: sum")
        return f'{arguments}, reduction="sum"', counts, True
    return arguments, counts, False


def _token_classes(writer: Writer) -> _Term:
    classes = writer.pick(TOKENS, TOKENS, CLASSES)
    ignored = writer.pick(None, -100, -100, 0, 3)
    name = _label_name(writer, language=True)
    shape = _shape(writer)
    _head(writer, classes)
    _label_input(writer, shape, classes, ignored, name)
    arguments, counts, added = _cross_entropy(writer, name, classes, ignored)
    form = writer.pick("flat", "flat", "view", "transposed", "nll", "module", "shifted", "shifted")
    counts_of = name
    if form == "shifted":
        writer.note("labels shifted in the module")
        counts = counts.replace(f'batch["{name}"]', f'batch["{name}"][:, 1:]')
        lines = [
            f"ahead, later = out[:, :-1], {name}[:, 1:]",
            f"loss = F.cross_entropy(ahead.flatten(0, 1), later.flatten(){arguments})",
        ]
    elif form == "flat":
        lines = [f"loss = F.cross_entropy(out.flatten(0, 1), {name}.flatten(){arguments})"]
    elif form == "view":
        lines = [f"loss = F.cross_entropy(out.view(-1, {classes}), {name}.view(-1){arguments})"]
    elif form == "transposed":
        lines = [f"loss = F.cross_entropy(out.transpose(1, 2), {name}{arguments})"]
    elif form == "nll" and "smoothing" not in arguments:
        writer.note("nll_loss of log_softmax")
        lines = [f"loss = F.nll_loss(F.log_softmax(out, -1).flatten(0, 1), {name}.flatten(){arguments})"]
    else:
        writer.note("a module as loss")
        criterion = writer.own("criterion", f"nn.CrossEntropyLoss({arguments.strip(', ')})")
        lines = [f"loss = {criterion}(out.permute(0, 2, 1), {name})"]
    return _Term(lines, counts, [counts_of], added)


def _classes(writer: Writer) -> _Term:
    name = _label_name(writer)
    ignored = writer.pick(None, None, -100, 2)
    shape = _shape(writer)
    _head(writer, CLASSES)
    _label_input(writer, shape, CLASSES, ignored, name)
    arguments, counts, added = _cross_entropy(writer, name, CLASSES, ignored)
    if writer.chance(0.15) and ignored is None and not added and "weight" not in arguments:
        writer.note("reduction: none")
        return _Term([f'loss = F.cross_entropy(out, {name}{arguments}, reduction="none").mean()'], EQUAL, [name])
    return _Term([f"loss = F.cross_entropy(out, {name}{arguments})"], counts, [name], added)


def _pixels(writer: Writer) -> _Term:
    name, ignored = _label_name(writer), writer.pick(None, 255, -100)
    batch = _shape(writer)
    writer.say(f"out = {writer.own('head', f'nn.Conv2d({writer.width}, {CLASSES}, 1)')}(h)")
    _label_input(writer, f"{batch}, {writer.size}, {writer.size}", CLASSES, ignored, name)
    arguments, counts, added = _cross_entropy(writer, name, CLASSES, ignored)
    return _Term([f"loss = F.cross_entropy(out, {name}{arguments})"], counts, [name], added)


def _manual_tokens(writer: Writer) -> _Term:
    """Cross entropy by hand: averages over all labels, so microbatches count alike."""
    name = _label_name(writer, language=True)
    shape = _shape(writer)
    _head(writer, TOKENS)
    _label_input(writer, shape, TOKENS, None, name)
    lines = writer.pick(
        [f"loss = -out.log_softmax(-1).gather(-1, {name}.unsqueeze(-1)).mean()"],
        [f"loss = (out.logsumexp(-1) - out.gather(-1, {name}[..., None]).squeeze(-1)).mean()"],
        [f"each = F.cross_entropy(out.flatten(0, 1), {name}.flatten(), reduction='none')", "loss = each.mean()"],
        [f"loss = -(F.one_hot({name}, {TOKENS}) * out.log_softmax(-1)).sum(-1).mean()"],
    )
    return _Term(lines, EQUAL, [name])


# --- numbers ----------------------------------------------------------------------------------------------------------

OF_NUMBERS = (
    "F.mse_loss(out, {y}{r})",
    "F.l1_loss(out, {y}{r})",
    "F.smooth_l1_loss(out, {y}{r})",
    "F.smooth_l1_loss(out, {y}, beta=0.5{r})",
    "F.huber_loss(out, {y}, delta=0.7{r})",
)
OWN_AVERAGES = (
    "(out - {y}).square().mean()",
    "((out - {y}) ** 2).sum(-1).mean()",
    "(out - {y}).abs().mean()",
    "F.mse_loss(out, {y}, reduction='none').mean()",
    "torch.log(torch.cosh(out - {y})).mean()",
    "(1 - F.cosine_similarity(out, {y}, dim=-1)).mean()",
    "(out - {y}).norm(dim=-1).mean()",
)


def _of_numbers(writer: Writer, name: str, shape: str) -> _Term:
    _head(writer, 3)
    writer.inputs[name] = f"torch.randn({shape}, 3, generator=g)"
    if writer.chance(0.4):
        return _Term([f"loss = {writer.pick(*OWN_AVERAGES).format(y=name)}"], EQUAL, [name])
    added = writer.chance(0.2)
    if added:
        writer.note("reduction: sum")
    chosen = writer.pick(*OF_NUMBERS).format(y=name, r=', reduction="sum"' if added else "")
    return _Term([f"loss = {chosen}"], EQUAL, [name], added)


def _targets(writer: Writer) -> _Term:
    return _of_numbers(writer, _label_name(writer), _shape(writer))


def _sequence_targets(writer: Writer) -> _Term:
    if writer.length is None:
        return _token_classes(writer)
    return _of_numbers(writer, _label_name(writer), _shape(writer))


def _masked_targets(writer: Writer) -> _Term:
    """A mean over what a mask keeps, written as a quotient."""
    if not writer.mask:
        return _manual_tokens(writer)
    if writer.length is None:
        name = _label_name(writer, language=True)
        shape = _shape(writer)
        _head(writer, TOKENS)
        _label_input(writer, shape, TOKENS, None, name)
        each = f"F.cross_entropy(out.transpose(1, 2), {name}, reduction='none')"
    else:
        name = _label_name(writer)
        shape = _shape(writer)
        _head(writer, 3)
        writer.inputs[name] = f"torch.randn({shape}, 3, generator=g)"
        each = f"(out - {name}).square().mean(-1)"
    kept = f"{writer.mask}.float()"
    counts = 'float(batch["mask"].sum())'
    return _Term([f"each = {each}", f"loss = (each * {kept}).sum() / {kept}.sum()"], counts, [name])


def _picture_target(writer: Writer) -> _Term:
    name, batch = _label_name(writer), _shape(writer)
    writer.say(f"out = {writer.own('head', f'nn.Conv2d({writer.width}, 2, 3, padding=1)')}(h)")
    writer.inputs[name] = f"torch.rand({batch}, 2, {writer.size}, {writer.size}, generator=g)"
    lines = writer.pick(
        [f"loss = F.mse_loss(torch.sigmoid(out), {name})"],
        [f"loss = F.binary_cross_entropy_with_logits(out, {name})"],
        [f"loss = F.binary_cross_entropy(torch.sigmoid(out), {name})"],
        [f"loss = F.l1_loss(out, {name})"],
    )
    return _Term(lines, EQUAL, [name])


def _binary(writer: Writer) -> _Term:
    name, batch = _label_name(writer), _shape(writer)
    _head(writer, CLASSES)
    writer.inputs[name] = f"(torch.rand({batch}, {CLASSES}, generator=g) < 0.4).float()"
    positive = writer.buffer(f"torch.full(({CLASSES},), 1.7)", stem="positive")
    lines = writer.pick(
        [f"loss = F.binary_cross_entropy_with_logits(out, {name})"],
        [f"loss = F.binary_cross_entropy_with_logits(out, {name}, pos_weight={positive})"],
        [f"loss = F.binary_cross_entropy_with_logits(out, {name}, weight={positive})"],
        [f"loss = F.binary_cross_entropy(out.sigmoid(), {name})"],
        [f"loss = F.soft_margin_loss(out, 2 * {name} - 1)"],
        [f"loss = nn.BCEWithLogitsLoss()(out, {name})"],
        [f"loss = -({name} * F.logsigmoid(out) + (1 - {name}) * F.logsigmoid(-out)).mean()"],
    )
    return _Term(lines, EQUAL, [name])


def _distribution(writer: Writer) -> _Term:
    name, batch = _label_name(writer), _shape(writer)
    _head(writer, CLASSES)
    made = f"torch.randn({batch}, {CLASSES}, generator=g)"
    way = writer.pick("batchmean", "log", "mean", "soft")
    writer.note(f"loss of distributions: {way}")
    writer.inputs[name] = f"{made}.{'log_softmax' if way == 'log' else 'softmax'}(-1)"
    lines = {
        "batchmean": [f'loss = F.kl_div(out.log_softmax(-1), {name}, reduction="batchmean")'],
        "log": [f'loss = F.kl_div(out.log_softmax(-1), {name}, reduction="batchmean", log_target=True)'],
        "mean": [f'loss = F.kl_div(out.log_softmax(-1), {name}, reduction="mean")'],
        "soft": [f"loss = F.cross_entropy(out, {name})"],
    }[way]
    return _Term(lines, EQUAL, [name])


def _cosine(writer: Writer) -> _Term:
    name, batch = _label_name(writer), _shape(writer)
    _head(writer, 4)
    writer.inputs[name] = f"torch.randn({batch}, 4, generator=g)"
    lines = writer.pick(
        [f"loss = F.cosine_embedding_loss(out, {name}, torch.ones(out.shape[0]))"],
        [f"loss = 1 - F.cosine_similarity(out, {name}).mean()"],
        [f"loss = (2 - 2 * (F.normalize(out, dim=-1) * F.normalize({name}, dim=-1)).sum(-1)).mean()"],
        [f"loss = F.triplet_margin_loss(out, {name}, {name}.flip(-1))"],
    )
    return _Term(lines, EQUAL, [name])


def _margins(writer: Writer) -> _Term:
    name, batch = _label_name(writer), _shape(writer)
    _head(writer, CLASSES)
    way = writer.pick("hinge", "hinge", "hinge", "hinge", "margin", "poisson", "gaussian")
    writer.note(f"loss of margins: {way}")
    if way in ("hinge", "margin"):
        writer.inputs[name] = f"torch.randint(0, {CLASSES}, ({batch},), generator=g)"
        lines = {
            "hinge": [
                f"right = out.gather(1, {name}.unsqueeze(1))",
                "loss = (1 + out - right).clamp(min=0).mean()",
            ],
            "margin": [f"loss = F.multi_margin_loss(out, {name})"],
        }[way]
    else:
        writer.inputs[name] = f"torch.randint(0, 4, ({batch}, {CLASSES}), generator=g).float()"
        lines = {
            "poisson": [f"loss = F.poisson_nll_loss(out, {name})"],
            "gaussian": [f"loss = F.gaussian_nll_loss(out, {name}, F.softplus(out) + 0.1)"],
        }[way]
    return _Term(lines, EQUAL, [name])


# --- several ----------------------------------------------------------------------------------------------------------


def _several(writer: Writer) -> _Term:
    """Two losses of two labels; both are means over all samples."""
    batch = _shape(writer)
    aside = writer.linear(writer.width, 2)
    _head(writer, CLASSES)
    writer.inputs["labels"] = f"torch.randint(0, {CLASSES}, ({batch},), generator=g)"
    writer.inputs["target"] = f"torch.randn({batch}, 2, generator=g)"
    lines = [
        "loss = F.cross_entropy(out, labels)",
        f"loss = loss + {writer.pick('0.5 * ', '')}F.{writer.pick('mse_loss', 'l1_loss')}({aside}(h), target)",
    ]
    return _Term(lines, EQUAL, ["labels", "target"])


def _weighted(writer: Writer) -> _Term:
    """A loss of samples that have weights."""
    name, batch = _label_name(writer), _shape(writer)
    _head(writer, CLASSES)
    writer.inputs[name] = f"torch.randint(0, {CLASSES}, ({batch},), generator=g)"
    writer.inputs["sample_weight"] = f"torch.rand({batch}, generator=g)"
    lines = [f'loss = (F.cross_entropy(out, {name}, reduction="none") * sample_weight).mean()']
    return _Term(lines, EQUAL, [name, "sample_weight"])
