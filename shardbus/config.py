"""Limits and time limits, in one place. Frozen, valid once built; reads no environment.

Every number that bounds something stands here, with its unit and bound in its name, and what happens at the bound in
its comment. Relations between limits are asserted.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

SLOTS: Final = 1024
"""Number of routing slots. Never changes: rows in stores belong to their slot."""

STORE_BYTES_LEAST: Final = 2 * 1024 * 1024
"""The least that `store_bytes_max` may be set to: a row of the largest event fits."""

PROTOCOL: Final = 4
"""Version of the wire protocol; a peer with another one is rejected with both numbers."""


StoreFull = Literal["stop", "drop_oldest"]
"""What a store does when it is full; see `Limits.store_full`."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """All bounds of a bus. The defaults are the product's; tests make them small."""

    # -- frames and messages
    batch_events_max: int = 512  # a batch leaves when full; 256 cost a tenth more, 1,024 save little
    batch_bytes_target: int = 256 * 1024  # a batch is closed once its bodies reach this
    event_bytes_max: int = 1024 * 1024  # a larger message is refused by `publish`
    key_bytes_max: int = 1024  # a longer key is refused by `publish`
    name_bytes_max: int = 128  # a longer message name is refused at registration
    headers_max: int = 32  # on one message; more are no sound frame
    own_headers_max: int = 26  # of these a program's own; more are refused by `publish`, so that what the bus adds fits
    frame_bytes_max: int = 2 * 1024 * 1024  # a larger frame costs its sender the connection (ZMQ_MAXMSGSIZE)

    # -- publisher
    outbox_events_max: int = 65_536  # per shard, sent or not; when full, `publish` waits
    outbox_bytes_max: int = 32 * 1024 * 1024  # likewise
    handed_events_max: int = 1024  # of a blocking client, above its outboxes; when full, `publish` waits for its loop
    handed_event_bytes_max: int = 1024  # likewise, for a larger event
    in_hand_events_max: int = 64  # of a blocking client's subscription, above its queue; the rest stays in that
    children_events_max: int = 262_144  # per shard, of what a worker's handlers publish; when full, that raises `OutboxFull`
    children_bytes_max: int = 128 * 1024 * 1024  # likewise
    route_cache_max: int = 16_384  # keys whose slot is remembered; when full, it starts over
    commands_in_flight_max: int = 16_384  # per shard; when full, `execute` waits

    # -- worker
    sessions_max: int = 256  # live publishers; one more is rejected and tries again
    credit_events_max: int = 262_144  # unfinished events of all publishers together
    credit_bytes_max: int = 128 * 1024 * 1024  # likewise, in bytes of packed events
    session_credit_events_max: int = 16_384  # unfinished events of one publisher; when spent, its outbox holds
    lane_events_max: int = 1024  # events waiting behind one key in memory; more go to the store
    lane_wait_s_max: float = 1.0  # a lane that has to wait for longer goes to the store
    queued_events_max: int = 8192  # events waiting behind all busy keys; above it, each longer lane goes to the store
    store_rows_max: int = 2_000_000  # dead letters and waiting events of a shard; when full, see `store_full`
    store_bytes_max: int = 1024 * 1024 * 1024  # of their bodies, and 512 a row; likewise
    # "stop": nothing more is acked as stored, so publishers wait. "drop_oldest": the oldest dead letters make room, and are
    # counted as dropped; waiting events and what parks its key never do.
    store_full: StoreFull = "stop"
    store_write_rows_max: int = 256  # rows of a kind in a transaction; more gain nothing and hold the others up
    blocked_peers_max: int = 4096  # peers that sent garbage and are ignored; the oldest is forgotten
    session_states_max: int = 65_536  # open sessions of one worker; when full, the one that is idle for longest ends

    # -- scheduled events, of a shard
    ahead_rows_max: int = 65_536  # in memory: before they are due and until their rows are gone; more stay in the store
    ahead_bytes_max: int = 64 * 1024 * 1024  # likewise, of their bodies, and 512 a row
    ahead_s_max: float = 5.0  # how long before it is due one may be read into memory
    due_events_max: int = 16_384  # that have begun and have not ended; what is due beyond these waits

    # -- subscriptions and streaming replies
    subscriptions_client_max: int = 4096  # of one client; one more is refused
    subscriptions_max: int = 16_384  # of one worker; one more is refused
    subscription_types_max: int = 32  # event types of one subscription; more are refused
    subscription_queue_bytes_max: int = 16 * 1024 * 1024  # that wait for one reader; then as `on_slow` says
    feed_events_max: int = 4096  # on the way to one subscription, from one worker; what comes on top is dropped, and told
    feed_bytes_max: int = 4 * 1024 * 1024  # likewise, in bytes
    feeds_bytes_max: int = 64 * 1024 * 1024  # to all subscriptions of a worker, which share it; likewise
    taken_events: int = 64  # so many more events are acknowledged to a feed at once, fewer a tenth of a second later
    taken_bytes: int = 4 * 1024  # likewise
    stream_items_max: int = 1024  # of a streaming reply on the way; the largest `window`
    stream_bytes_max: int = 4 * 1024 * 1024  # likewise, in bytes; at either its handler waits

    # -- time, in seconds
    ack_delay_s: float = 0.002  # how long an ack that nobody waits for may be put off, so that one serves many frames
    session_silence_s: float = 30.0  # a publisher that is silent for longer is forgotten, and its sessions end
    session_ends_s: float = 10.0  # of a worker that ends, for the ends of all its sessions' states; what is left is logged
    ping_interval_s: float = 1.0  # how often a publisher with unfinished events asks for a full ack
    hello_interval_s: float = 0.5  # how often an unanswered greeting is repeated
    subscription_silence_s: float = 30.0  # a subscription that is not heard of for longer is forgotten
    taken_interval_s: float = 10.0  # how often a subscription says that it is alive

    def __post_init__(self) -> None:
        assert self.batch_bytes_target + self.event_bytes_max + 64 * 1024 <= self.frame_bytes_max
        assert self.own_headers_max <= self.headers_max
        assert self.outbox_events_max >= 2 * self.batch_events_max
        assert self.children_events_max >= self.outbox_events_max
        assert self.children_bytes_max >= self.outbox_bytes_max
        assert self.session_credit_events_max >= 2 * self.batch_events_max
        # One unfinished event must not keep the next full batch from leaving, however many publishers share the credit.
        assert self.credit_events_max >= self.sessions_max * 2 * self.batch_events_max
        assert self.ack_delay_s * 10 <= self.ping_interval_s
        assert self.event_bytes_max + 1024 <= self.store_bytes_max  # one row of the largest fits
        assert self.ahead_rows_max >= self.due_events_max
        assert self.ahead_rows_max >= 2 * 512  # pages
        assert self.ahead_bytes_max >= 2 * (1024 * 1024 + 512 * 512)  # likewise
        assert self.ahead_s_max >= 0.5  # a mark is written a third of a second ahead
        assert self.ping_interval_s * 3 <= self.session_silence_s
        assert self.session_states_max > 0
        assert self.taken_interval_s * 3 <= self.subscription_silence_s
        # A feed is never so small that it is full before its reader would say that it took something.
        assert self.taken_bytes <= self.feeds_bytes_max // self.subscriptions_max
        assert self.taken_events <= self.feed_events_max

    def __repr__(self) -> str:
        """Those that are not the defaults: all of them would bury every signature that has `limits=`."""
        own = {name: getattr(self, name) for name in self.__struct_fields__}
        usual = dict(zip(self.__struct_fields__, self.__struct_defaults__, strict=True))
        return f"Limits({', '.join(f'{name}={value!r}' for name, value in own.items() if value != usual[name])})"

    def credit_share(self, sessions: int) -> tuple[int, int]:
        """Events and bytes of credit for each of `sessions` live publishers."""
        sessions = max(1, sessions)
        events = min(self.session_credit_events_max, max(2 * self.batch_events_max, self.credit_events_max // sessions))
        return events, self.credit_bytes_max // sessions


DEFAULT_LIMITS: Final = Limits()
