"""The simulated world with handlers that publish: each event is the root of a tree, and every node of it must be handled.

What the network, the stores and the deaths of workers do is the world's; a worker's own client lives and dies with it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import msgspec
from world import LIMITS, VirtualLoop, World

from shardbus.client import Client
from shardbus.context import Context
from shardbus.messages import Event
from shardbus.registry import OnDeadLetter, Registry
from shardbus.retry import Retry
from shardbus.shard import Shard
from shardbus.testing.cluster import CONTROL, ClusterConnector


class Ball(Event, key="key"):
    key: str
    sender: int
    n: int
    path: str = ""  # which child of which child it is
    left: int = 0


class Call(msgspec.Struct, frozen=True):
    """A handler ran to its end."""

    handler: str
    ball: Ball
    message: str
    redelivered: bool
    failed: bool


class PublishingWorld(World):
    """As its base, with an application of its own."""

    def __init__(self, seed: int, loop: VirtualLoop) -> None:
        super().__init__(seed, loop)
        shape = random.Random(f"{seed}/shape")
        self.depth = shape.choice([1, 3, 8])
        self.fan_out = shape.choice([1, 1, 2]) if self.depth < 8 else 1
        self.roots = shape.choice([5, 20])
        self.fails = shape.choice([0.0, 0.1, 0.3])
        self.played: list[Call] = []
        self.tries: Counter[tuple[str, int, int, str]] = Counter()
        self.registry = Registry("publishing")
        retry = Retry(attempts=3, base_s=shape.choice([0.01, 0.5, 2.0]))
        on_dead_letter: OnDeadLetter = "park" if self.parks else "continue"
        self.registry.on(Ball, retry=retry, on_dead_letter=on_dead_letter)(self.play)
        self.registry.on(Ball, retry=retry)(self.watch)

    # -- the application

    def chance_of(self, ball: Ball, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{ball.sender}/{ball.n}/{ball.path}/{what}")

    def children_of(self, ball: Ball) -> Iterator[Ball]:
        chance = self.chance_of(ball, "children")
        for at in range(self.fan_out if ball.left else 0):
            key = ball.key if chance.random() < 0.3 else f"k{chance.randrange(self.keys)}"
            yield Ball(key=key, sender=ball.sender, n=ball.n, path=f"{ball.path}{at}", left=ball.left - 1)

    def is_doomed(self, ball: Ball) -> bool:
        """Whether it becomes a dead letter, at least once."""
        return self.chance_of(ball, "fate").random() < self.fails / 2

    async def play(self, ball: Ball, context: Context) -> None:
        chance = self.chance_of(ball, "pace")
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.02)
        await context.publish_many(list(self.children_of(ball)))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.2)
        self.ended("play", ball, context, self.is_doomed(ball) and (not self.parks or self.tried("play", ball) <= 4))

    async def watch(self, ball: Ball, context: Context) -> None:
        flaky = self.chance_of(ball, "watch").random() < self.fails
        self.ended("watch", ball, context, flaky and self.tried("watch", ball) <= 1)

    def tried(self, handler: str, ball: Ball) -> int:
        self.tries[handler, ball.sender, ball.n, ball.path] += 1
        return self.tries[handler, ball.sender, ball.n, ball.path]

    def ended(self, handler: str, ball: Ball, context: Context, fails: bool) -> None:
        self.played.append(Call(handler, ball, context.message_id, context.redelivered, fails))
        if fails:
            raise ValueError("as it was to")

    # -- the bus

    # -- a life

    async def sender(self, number: int) -> Client:
        client = Client(
            "world", ClusterConnector(self), CONTROL, limits=LIMITS, now=self.now_ns, publisher=b"%016d" % number
        )
        await client.start(60.0)
        self.clients.append(client)
        chance = random.Random(f"{self.seed}/{number}")
        for n in range(self.roots):
            await client.publish(Ball(key=f"k{chance.randrange(self.keys)}", sender=number, n=n, left=self.depth))
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.4)
        return client

    async def run(self) -> None:
        for at in range(self.shards_count):
            await self.start_shard(at)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.faults())
            group.create_task(self.failing_stores())
            group.create_task(self.purged())
            group.create_task(self.redrives())
            senders = [group.create_task(self.sender(number)) for number in range(self.senders)]
        clients = [task.result() for task in senders]
        while any(self.parks and rows.dead for rows in self.rows) or any(client.ledger().in_flight for client in clients):
            await asyncio.sleep(0.5)
            if self.parks:  # what is parked may be a child, for which its parents wait
                await self.redrive(clients[0])
            assert self.loop.now < 3600, "events are never acked"
        ledgers = [await client.flush(600.0) for client in clients]
        while not all(self.is_at_rest(shard) for shard in self.shards):
            await asyncio.sleep(0.5)
            if self.parks:
                await self.redrive(clients[0])
            assert self.loop.now < 3600, "waiting events never end"
        drained = [await shard.drain(5.0) for shard in self.shards if shard is not None]
        for client in clients:
            await client.abort()
        for shard in self.shards:
            assert shard is not None
            await shard.close()
            await self.outgoing[shard.shard].close()
        if self.deaths:
            await asyncio.wait(self.deaths)
        assert not self.broken
        assert drained == [[]] * self.shards_count
        for ledger in ledgers:
            assert ledger.published == self.roots == ledger.handled + ledger.dead + ledger.waiting
        self.check()

    def is_at_rest(self, shard: Shard | None) -> bool:
        if shard is None or len(shard._deferred) or not shard.lanes.idle():
            return False
        rows = self.rows[shard.shard]
        return not (rows.waiting or (self.parks and rows.dead))

    def check(self) -> None:
        expected: dict[tuple[int, int, str], Ball] = {}
        nodes = [Ball(key="", sender=one, n=n, left=self.depth) for one in range(self.senders) for n in range(self.roots)]
        while nodes:
            ball = nodes.pop()
            expected[ball.sender, ball.n, ball.path] = ball
            nodes += self.children_of(ball)
        for handler in ("play", "watch"):
            calls: dict[tuple[int, int, str], list[Call]] = defaultdict(list)
            for call in self.played:
                if call.handler == handler:
                    calls[call.ball.sender, call.ball.n, call.ball.path].append(call)
            assert calls.keys() == expected.keys(), f"{expected.keys() - calls.keys()} are lost"
            for identity, several in calls.items():
                again = [call for call in several[1:] if not call.redelivered]
                assert not again, f"{identity} came again and did not say so"
        if not self.died:
            succeeded = [(call.handler, call.message) for call in self.played if not call.failed]
            assert len(succeeded) == len(set(succeeded)), "a handler that succeeded was called again though no worker died"
        if not self.parks:
            doomed = sum(map(self.is_doomed, expected.values()))
            dead = sum(len(rows.dead) + rows.dropped for rows in self.rows)
            assert dead >= doomed
        if not self.died and not self.fails:
            assert len(self.played) == 2 * len(expected)
        self.check_order()

    def check_order(self) -> None:
        """Roots of a key have their first outcomes in the order in which they were published."""
        first: dict[tuple[int, str], list[int]] = defaultdict(list)
        seen: set[tuple[int, int]] = set()
        for call in self.played:
            root = (call.ball.sender, call.ball.n)
            if call.handler == "play" and not call.ball.path and root not in seen:
                seen.add(root)
                first[call.ball.sender, call.ball.key].append(call.ball.n)
        for numbers in first.values():
            assert numbers == sorted(numbers)
