"""WebRTC in the simulation: a channel opens if each end has the other's SDP."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fake_sdp import make_sdp, name_in
from sim_judge import judge_sdp
from sim_world import Broken

from connectoid import Close, Gather, Join, Write

if TYPE_CHECKING:
    from sim_app import App


class Pc:
    """A peer connection of an app."""

    def __init__(self, app: App, attempt_id: int, remote: str) -> None:
        self.app = app
        self.attempt_id = attempt_id
        self.remote = remote
        self.process = app.process
        self.local = ""
        self.peer: Pc | None = None
        self.closed = False
        # When its channel opens, and from then on when the last message arrived.
        self.open_s = 0.0

    @property
    def alive(self) -> bool:
        """Return whether its program still has it."""
        return not self.closed and self.app.process == self.process


class PlayedWebRTC:
    """The peer connection of an app, and its reports to the machine."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.world = app.world
        self.pc: Pc | None = None

    # -- Effects -------------------------------------------------------------------------

    def gather(self, effect: Gather) -> None:
        """Make a peer connection, and report its SDP later."""
        if self.pc:
            self.close(Close(self.pc.attempt_id))
        remote = effect.offer["sdp"] if effect.offer else ""
        judge_sdp(self.app, remote)
        self.pc = Pc(self.app, effect.attempt_id, remote)
        self.app.after(self.world.draw.uniform(0.1, 2), functools.partial(self._gathered, self.pc))

    def join(self, effect: Join) -> None:
        """Take the answer, and open the channel if there is a path."""
        self.app.check_saved()
        pc = self.pc
        answer = effect.answer["sdp"]
        judge_sdp(self.app, answer)
        if pc is None or pc.attempt_id != effect.attempt_id:
            raise Broken(f"{self.app.name}: joins a peer connection that is not there")
        pc.remote = answer
        self.world.note(self.app.name, "joins", name_in(answer))
        other = self.world.pcs[answer]
        if other.remote == pc.local and self.world.draw.random() >= self.world.chaos.no_path:
            delay_s = self.world.draw.uniform(0.2, 1)
            self.world.after(delay_s, functools.partial(open_channels, pc, other))

    def write(self, effect: Write) -> None:
        """Carry octets to the other end, in order."""
        self.app.check_saved()
        pc = self.pc
        if pc is None or pc.attempt_id != effect.attempt_id or pc.peer is None:
            return
        if self.world.draw.random() < self.world.chaos.mute:
            return
        peer = pc.peer
        arrives_s = self.world.now_s + self.world.draw.uniform(0.02, 0.2)
        peer.open_s = max(peer.open_s, arrives_s) + 1e-6
        peer.app.after(
            peer.open_s - self.world.now_s,
            functools.partial(peer.app.webrtc.report, peer, "channel_message", effect.octets),
        )

    def close(self, effect: Close) -> None:
        """Close the peer connection."""
        pc = self.pc
        if pc and pc.attempt_id == effect.attempt_id and not pc.closed:
            pc.closed = True
            self.pc = None
            tell_peer(pc)

    def die(self) -> None:
        """End with the program; the other end notices in a while."""
        if self.pc:
            self.pc.closed = True
            tell_peer(self.pc)
        self.pc = None

    # -- Reports -------------------------------------------------------------------------

    def _gathered(self, pc: Pc) -> None:
        if self.app.contact is None or pc.closed:
            return
        if self.world.draw.random() < self.world.chaos.no_sdp:
            if self.world.draw.random() < 0.5:
                self.app.step("gathered", pc.attempt_id, None)
            return
        kind = "answer" if pc.remote else "offer"
        name = f"{self.app.name} {len(self.world.pcs)}"
        sdp = make_sdp(kind, name, self.world.plan.candidates)
        pc.local = sdp["sdp"]
        self.world.pcs[pc.local] = pc
        self.app.step("gathered", pc.attempt_id, sdp)

    def open(self, pc: Pc, peer: Pc) -> None:
        """Open the channel of a peer connection, after a moment of its own."""
        pc.peer = peer
        delay_s = self.world.draw.uniform(0, 0.2)
        pc.open_s = self.world.now_s + delay_s
        self.app.after(delay_s, functools.partial(self.report, pc, "channel_opened"))

    def report(self, pc: Pc, event: str, *args: Any) -> None:
        """Tell the machine, if the peer connection is still open."""
        if self.app.contact is not None and not pc.closed:
            self.app.step(event, pc.attempt_id, *args)

    def hear_close(self, pc: Pc) -> None:
        """Notice that the other end has gone."""
        if self.app.contact is not None and not pc.closed:
            pc.closed = True
            self.app.step("channel_closed", pc.attempt_id)


def open_channels(one: Pc, other: Pc) -> None:
    """Open both ends of a channel, if both programs still have them."""
    if one.alive and other.alive:
        one.app.webrtc.open(one, other)
        other.app.webrtc.open(other, one)


def tell_peer(pc: Pc) -> None:
    """Let the other end notice that this one has closed."""
    peer = pc.peer
    if peer and peer.alive:
        delay_s = pc.app.world.draw.uniform(0.05, 15)
        peer.app.after(delay_s, functools.partial(peer.app.webrtc.hear_close, peer))
