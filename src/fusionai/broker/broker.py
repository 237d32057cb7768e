"""The broker: admits members, keeps the books, launches jobs, watches over them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from fusionai.broker.journal import Journal
from fusionai.broker.launching import PROBES_TIMEOUT_S, Launcher
from fusionai.broker.lifecycle import Lifecycle
from fusionai.broker.pool_changes import PoolChanges
from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import PRESENT, MemberRecord
from fusionai.broker.replanner import Replanner
from fusionai.broker.store import SqliteStore
from fusionai.broker.validation import check_heartbeat, check_progress, check_register, check_replan, check_submit
from fusionai.errors import AuthenticationError, ConfigError, NetworkError, ProtocolError, StorageError, TokenError
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import LabConfig
from fusionai.network.limits import Limits
from fusionai.network.link import Link
from fusionai.network.token import JoinToken
from fusionai.pool.advertising import advertised
from fusionai.pool.codec import GRAPH, decode, encode, kind_of
from fusionai.pool.messages import (
    DeclineReplan,
    ForgetPlan,
    Heartbeat,
    JobEnded,
    JobProgress,
    LeavePool,
    MeasureLinks,
    MemberRegistered,
    RegisterMember,
    ReplanJob,
    Status,
    StatusQuery,
    SubmitJob,
    SwitchPlan,
    WishToLeave,
)
from fusionai.scheduling.recovery import PATIENCE
from fusionai.units.addresses import split_address

log = logging.getLogger(__name__)

NAME = "broker"
"""The broker's name in lab mode."""

DATABASE = "broker.sqlite"
_ALIVE = "alive_s"
"""Setting: Unix time at which the broker was last known to run. Stays of members are counted up to it."""
_ALIVE_EVERY_S = 60.0
_MOST_ESTIMATED = 32
"""Compnodes of a pool whose estimated pairs a status lists; of larger ones it tells each member's access instead."""
LIMITS = Limits(bulk_body_bytes=256 << 20)
"""Members send the broker OP-DAGs and probes, no tensors."""


class BrokerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """How patient a broker is, in seconds."""

    heartbeat_s: float = 2.0
    """Between two heartbeats of a compnode. They carry figures for people; whether it lives, its link tells."""
    grace_s: float = PATIENCE.broker_link_s
    """How long a machine of a running job may be without a connection to the broker before the job is given up."""
    recovery_s: float = PATIENCE.broker_restart_s
    """The same after a restart of the broker; members try again at least every 30 s."""
    probe_s: float = 0.4
    """What one link probe takes."""


class Broker:
    """A pool's broker. Make it inside the event loop; `start`, then `close`."""

    def __init__(
        self,
        identity: Identity,
        state_folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: Sequence[str] = (),
        lab: LabConfig | None = None,
        times: BrokerTimes | None = None,
    ) -> None:
        """`port` 0 takes the port of the last start on this state folder, so that its tokens still lead here."""
        self.address = ""
        """Where it listens, as "host:port"."""
        self._identity = identity
        self._host, self._port, self._advertise = host, port, tuple(advertise)
        self._times = times or BrokerTimes()
        self._addresses: tuple[str, ...] = ()
        endpoint = Endpoint(identity, self, authorise=self._authorise, limits=LIMITS, lab=lab, name=NAME)
        self._journal = Journal(lambda: SqliteStore(state_folder / DATABASE))
        self._state = PoolState(endpoint, self._journal)
        self._prober = Prober(self._state, seconds=self._times.probe_s)
        self._lifecycle = Lifecycle(
            self._state,
            self._prober,
            patience=replace(PATIENCE, broker_link_s=self._times.grace_s, broker_restart_s=self._times.recovery_s),
        )
        self._launcher = Launcher(self._state, self._prober, self._lifecycle)
        self._changes = PoolChanges(self._state, self._prober)
        self._replanner = Replanner(self._state, self._prober, self._lifecycle, self._launcher)
        self._registered: dict[PeerId, tuple[Link, MemberRecord]] = {}
        self._closing = False
        self._status: asyncio.Task[bytes] | None = None
        self._requests: dict[str, Callable[[MemberRecord, bytes], Awaitable[bytes]]] = {
            kind_of(SubmitJob): self._on_submit,
            kind_of(StatusQuery): self._on_status,
            kind_of(MeasureLinks): self._on_measure,
            kind_of(JobEnded): self._on_ended,
            kind_of(LeavePool): self._on_leave,
            kind_of(WishToLeave): self._on_wish_to_leave,
            kind_of(ReplanJob): self._on_replan,
            kind_of(SwitchPlan): self._on_switch,
            kind_of(ForgetPlan): self._on_forget,
        }

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load what is known and listen.

        Raises:
            StorageError: the state folder cannot be used.
            ConfigError: the port is in use, or an address is malformed.
        """
        await self._journal.open()
        try:
            members, jobs, links = await self._journal.load()
            self._state.registry.restore(members, float(await self._journal.get(_ALIVE) or 0.0))
            self._state.jobs.restore(jobs)
            self._state.links.restore(links, {self._identity.peer_id, *(each.peer for each in members)})
            self.address = await self._listen()
            self._addresses = advertised(self.address, self._advertise)
            self._lifecycle.recover()
            self._state.tasks.start(self._note_alive(), "alive")
        except BaseException:
            await self.close()
            raise
        log.info("broker %s listens on %s", self._identity.peer_id[:12], self.address)

    async def _listen(self) -> str:
        endpoint = self._state.endpoint
        kept = await self._journal.get("port") if self._port == 0 else None
        if kept is None:
            address = await endpoint.listen(self._host, self._port)
        else:
            try:
                address = await endpoint.listen(self._host, int(kept))
            except ConfigError as error:
                address = await endpoint.listen(self._host, 0)
                log.warning("%s; listening on %s instead, so tokens made before lead nowhere", error, address)
        await self._journal.put("port", str(split_address(address)[1]))
        return address

    async def close(self) -> None:
        """Stop serving and write the books. Running jobs go on without the broker."""
        if self._closing:
            return
        self._closing = True
        await self._prober.close()
        await self._state.tasks.close()
        await self._state.endpoint.close()
        await self._write_alive()
        await self._journal.close()

    def token(self, role: str = "member", lifetime_s: float = 86_400.0) -> str:
        """Return a join token for this broker."""
        return JoinToken.issue(self._identity, self._addresses, role, lifetime_s).encode()

    def status(self) -> Status:
        """Return the pool as it is known now."""
        registry = self._state.registry
        present = {self._identity.peer_id, *(peer for peer in self._registered if registry.is_present(peer))}
        access = self._state.estimates.known
        links = self._state.links.status(present, self._state.name, registry.bytes_sent)
        compnodes = [each.peer for each in registry.present("compnode")]
        if len(compnodes) <= _MOST_ESTIMATED:
            links += self._state.links.estimated_status(compnodes, access, self._state.name, registry.bytes_sent)
        return Status(
            broker=self._identity.peer_id,
            compnodes=registry.status(self._state.now_s(), access),
            links=links,
            jobs=self._state.jobs.status(),
        )

    # --- admission --------------------------------------------------------------------------------------------

    async def _authorise(self, peer: PeerId, credential: bytes) -> None:
        """Admit whoever shows a token of this broker; a member that has not left needs no fresh one."""
        try:
            text = credential.decode("ascii")
        except UnicodeDecodeError as error:
            raise TokenError("the join token is malformed: it is not text; copy the whole word") from error
        if not text:
            raise TokenError("a join token is needed to enter this pool; ask the broker's operator for one")
        known = self._state.registry.get(peer)
        lasting = known is not None and known.state != "left"
        token = JoinToken.decode(text, now_s=0.0 if lasting else None)
        if token.broker != self._identity.peer_id:
            raise TokenError(
                f"the join token is for the broker {token.broker[:12]}, but this is {self._identity.peer_id[:12]}; "
                "take a token of this one"
            )
        if token.role != "member":
            raise TokenError(f"the token is for the role {token.role[:40]!r}, which cannot join")

    # --- Handler ----------------------------------------------------------------------------------------------

    async def on_link(self, link: Link) -> None:
        """A peer with a token; it is nobody until it registers."""
        log.debug("%s is connected", link.peer[:12])

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Answer a member."""
        if kind == kind_of(RegisterMember):
            return await self._on_register(link, payload)
        handler = self._requests.get(kind)
        if handler is None:
            raise ProtocolError(f"the broker knows no request {kind!r}; update fusionai on one of both sides")
        return await handler(self._member(link), payload)

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Hear a member."""
        member = self._member(link)
        if kind == kind_of(Heartbeat):
            heartbeat = decode(Heartbeat, payload)
            check_heartbeat(heartbeat)
            self._state.registry.heartbeat(member.peer, heartbeat, self._state.now_s())
            if member.role == "compnode":
                self._lifecycle.heartbeat(member.peer, heartbeat)
        elif kind == kind_of(JobProgress):
            progress = decode(JobProgress, payload)
            check_progress(progress)
            self._lifecycle.progress(member.peer, progress)
        elif kind == kind_of(DeclineReplan):
            decline = decode(DeclineReplan, payload)
            self._changes.decline(self._lifecycle.owned(member.peer, decline.job), decline)
        else:
            log.info("%s sent a notice %r that this version does not know", member.name, kind)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take an OP-DAG from an owner."""
        member = self._member(link)
        if kind != GRAPH or member.role != "owner":
            raise ProtocolError(f"the broker takes no {kind!r} from a {member.role}")
        await self._launcher.graphs.put(member.peer, header.decode("ascii", "replace"), bytes(body))

    async def on_close(self, link: Link, error: NetworkError) -> None:
        """A member is lost, unless it left before."""
        self._launcher.graphs.drop(link.peer)
        held = self._registered.get(link.peer)
        if held is None or held[0] is not link:
            return
        del self._registered[link.peer]
        if self._closing:
            return
        member = held[1]
        if member.role == "observer":
            self._state.registry.forget(member.peer)
            return
        record = self._state.registry.depart(member.peer, "lost", self._state.now_s())
        if record is not None and record.state == "lost":
            log.warning("%s %s is lost: %s", member.role, record.name, error)
            self._lifecycle.gone(member.peer, str(error), for_good=False)

    # --- requests ---------------------------------------------------------------------------------------------

    async def _on_register(self, link: Link, payload: bytes) -> bytes:
        message = decode(RegisterMember, payload)
        check_register(message)
        known = self._state.registry.get(link.peer)
        if known is not None and known.role != message.role and self._state.jobs.of_owner(link.peer):
            raise AuthenticationError(f"{known.name} is the {known.role} of a running job, and cannot be more")
        record = self._state.registry.register(link.peer, message, self._state.now_s())
        self._registered[link.peer] = (link, record)
        if known is None or known.addresses != record.addresses:
            self._state.links.forget(link.peer)
        self._lifecycle.returned(link.peer)
        if record.role != "observer":
            log.info("%s %s is here (%s)", record.role, record.name, link.peer[:12])
            self._prober.consider(link.peer)
            self._changes.come(record)
        return encode(MemberRegistered(name=record.name, heartbeat_s=self._times.heartbeat_s))

    async def _on_submit(self, member: MemberRecord, payload: bytes) -> bytes:
        if member.role != "owner":
            raise ProtocolError(f"a {member.role} submits no jobs; register as owner")
        message = decode(SubmitJob, payload)
        check_submit(message)
        return encode(await self._launcher.submit(member, message))

    async def _on_status(self, member: MemberRecord, payload: bytes) -> bytes:
        # Of a large pool it takes long to make: all who asked by now get the same.
        if self._status is None:
            self._status = asyncio.get_running_loop().create_task(self._fresh_status())
        return await asyncio.shield(self._status)

    async def _fresh_status(self) -> bytes:
        try:
            await self._state.estimates.refresh(now=False)
        finally:
            self._status = None
        return encode(self.status())

    async def _on_measure(self, member: MemberRecord, payload: bytes) -> bytes:
        self._prober.measure_again()
        peers = [self._state.endpoint.peer_id, *(each.peer for each in self._state.registry.idle())]
        await self._prober.settle(peers, timeout_s=3 * PROBES_TIMEOUT_S)
        await self._state.estimates.refresh(now=True)
        return encode(self.status())

    async def _on_ended(self, member: MemberRecord, payload: bytes) -> bytes:
        self._lifecycle.ended(member.peer, decode(JobEnded, payload))
        await self._journal.flush()
        return b""

    async def _on_replan(self, member: MemberRecord, payload: bytes) -> bytes:
        message = decode(ReplanJob, payload)
        check_replan(message)
        return encode(await self._replanner.prepare(member, message))

    async def _on_switch(self, member: MemberRecord, payload: bytes) -> bytes:
        message = decode(SwitchPlan, payload)
        self._lifecycle.switch(self._lifecycle.owned(member.peer, message.job).job, message.epoch)
        await self._journal.flush()
        return b""

    async def _on_forget(self, member: MemberRecord, payload: bytes) -> bytes:
        message = decode(ForgetPlan, payload)
        record = self._lifecycle.owned(member.peer, message.job)
        if record.preparing is not None and record.preparing.epoch == message.epoch:
            self._lifecycle.forget(record.job, message.reason[:500], tell_owner=False)
        return b""

    async def _on_leave(self, member: MemberRecord, payload: bytes) -> bytes:
        reason = decode(LeavePool, payload).reason[:500] or "it left"
        record = self._state.registry.depart(member.peer, "left", self._state.now_s())
        if record is not None and record.role != "observer":
            log.info("%s %s left: %s", record.role, record.name, reason)
        self._lifecycle.gone(member.peer, f"it left the pool ({reason})", for_good=True)
        if member.role == "owner":
            self._state.links.forget(member.peer)  # the next run of an owner has another key
        return b""

    async def _on_wish_to_leave(self, member: MemberRecord, payload: bytes) -> bytes:
        self._changes.relieve(member, decode(WishToLeave, payload).reason[:500] or "it wants to leave")
        return b""

    # --- inside -----------------------------------------------------------------------------------------------

    async def _note_alive(self) -> None:
        while True:
            await self._write_alive()
            await asyncio.sleep(_ALIVE_EVERY_S)

    async def _write_alive(self) -> None:
        try:
            await self._journal.put(_ALIVE, repr(self._state.now_s()))
        except StorageError as error:
            log.error("%s", error)

    def _member(self, link: Link) -> MemberRecord:
        held = self._registered.get(link.peer)
        record = self._state.registry.get(link.peer)
        if held is None or held[0] is not link or record is None or record.state not in PRESENT:
            raise AuthenticationError(f"{link.peer[:12]} has not registered with this broker")
        return record
