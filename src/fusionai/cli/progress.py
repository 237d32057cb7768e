"""Live progress of a training run in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fusionai.owner.replan_event import ReplanEvent
from fusionai.owner.training_job import Observer, StepEvent
from fusionai.pool.messages import JobLaunched
from fusionai.training.describe import stage_line
from fusionai.training.machine import Machine
from fusionai.units.byte_counts import bytes_text


class LiveProgress(Observer):
    """Shows the loss, tokens/s, the share and the business of each machine, and the bytes on each link.

    On a terminal it redraws in place. Elsewhere it prints a line from time to time. Use it as a context manager.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, note="")
        self._machines: Sequence[Machine] = ()
        self._names: dict[str, str] = {}
        self._bytes: dict[tuple[str, str], int] = {}
        self._event: StepEvent | None = None
        self._lab = False
        self._printed = 0
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def launched(self, launched: JobLaunched, machines: Sequence[Machine]) -> None:
        """Show the plan."""
        self._machines, self._names, self._lab = machines, launched.names, launched.lab
        for line in launched.plan.explanation:
            self._console.print(line, highlight=False, markup=False)
        if self._lab:
            self._console.print("lab mode: speeds or links are emulated", style="yellow")

    def ready(self) -> None:
        """Say that training starts."""
        self._console.print("every machine has its weights; training starts")

    def stepped(self, event: StepEvent) -> None:
        """Show a step."""
        self._event = event
        for peer, report in event.result.reports.items():
            for target, count in report.bytes_sent.items():
                self._bytes[peer, target] = self._bytes.get((peer, target), 0) + count
        note = f"loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=event.step, total=event.steps, note=note)
        if event.evaluation is not None:
            self._console.print(f"step {event.step}: held-out loss {event.evaluation:.4f}")
        due = event.step == event.steps or event.step * 20 // event.steps > self._printed
        if not self._console.is_terminal and due:
            self._printed = event.step * 20 // event.steps
            self._console.print(f"step {event.step}/{event.steps}  {note}")

    def replanned(self, event: ReplanEvent) -> None:
        """Print the outcome of a search for a new plan, and show the new plan's machines from now on."""
        if event.error is not None:
            text = f"step {event.step}: no new plan ({event.reason}): {event.error}"
            self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
            return
        self._machines, self._names = event.machines, dict(event.names)
        self._console.print(
            f"step {event.step}: new plan: {event.reason}; {bytes_text(event.bytes_moved)} moved, "
            f"{event.pause_s:.2f} s between two steps",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def saved(self, path: str) -> None:
        """Name a checkpoint."""
        self._console.print(f"checkpoint: {path}", highlight=False, soft_wrap=True)

    def stopping(self) -> None:
        """Say what is waited for."""
        self._console.print(
            "stopping: the step under way ends and a checkpoint is written; Ctrl-C again leaves at once",
            highlight=False,
            soft_wrap=True,
        )

    def summary(self) -> Table:
        """Return the table of machines as it stands."""
        table = Table(box=None, pad_edge=False)
        for column in ("compnode", "holds", "busy", "memory", "sent to"):
            table.add_column(column, overflow="fold")
        for machine in self._machines:
            report = self._event.result.reports.get(machine.peer) if self._event else None
            sent = [
                f"{self._name(target)} {bytes_text(count)}"
                for (source, target), count in self._bytes.items()
                if source == machine.peer
            ]
            table.add_row(
                machine.name,
                "; ".join(stage_line(subdag) for subdag in machine.subdags),
                f"{report.busy_s / self._event.result.seconds:.0%}" if report and self._event else "",
                bytes_text(report.memory_bytes) if report else "",
                ", ".join(sent),
            )
        return table

    def _name(self, peer: str) -> str:
        for machine in self._machines:
            if machine.peer == peer:
                return machine.name
        return self._names.get(peer, peer[:8])

    def _draw(self) -> Group:
        lab = [Text("lab mode: speeds or links are emulated", style="yellow")] if self._lab else []
        return Group(self.summary(), *lab, self._bar)
