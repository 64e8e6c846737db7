"""A Flower grid in one process: the nodes are a ClientApp, called when their replies are asked for.

Flower's simulation engine runs on ray, a pinned and heavy dependency, with a copy of the model in
each of its processes. Here one process has two: the server's, and one for all clients. Everything
passes through Flower's serialization, messages and clients' states alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN = 1
_FIRST_NODE = 1000


class LocalGrid(Grid):
    """Nodes of this process.

    Args:
        app: what every node runs.
        nodes: the configuration of each node.
        run_config: the run's configuration.

    Attributes:
        sent, received: bytes of the serialized messages to and from the nodes.
        contexts: the serialized context of every node, in order.
    """

    def __init__(
        self,
        app: ClientApp,
        nodes: Sequence[UserConfig],
        run_config: UserConfig | None = None,
    ) -> None:
        self.app, self.run_config = app, run_config or {}
        self.sent = self.received = 0
        self.contexts = {
            _FIRST_NODE + k: context_to_proto(
                Context(
                    run_id=_RUN,
                    node_id=_FIRST_NODE + k,
                    node_config=dict(node),
                    state=RecordDict(),
                    run_config=self.run_config,
                )
            ).SerializeToString()
            for k, node in enumerate(nodes)
        }
        self._waiting: dict[str, bytes] = {}
        self._numbers = itertools.count(1)
        self._run = Run.create_empty(run_id=_RUN)
        # What Flower's own runtimes set before an app makes its first message.
        TaskIdentity.run_id, TaskIdentity.task_id = _RUN, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def start(self, server: ServerApp) -> None:
        """Run a ServerApp to its end."""
        server(
            self,
            Context(
                run_id=_RUN,
                node_id=SUPERLINK_NODE_ID,
                node_config={},
                state=RecordDict(),
                run_config=self.run_config,
            ),
        )

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages for nodes; their numbers."""
        names = []
        for message in messages:
            name = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = name
            self._waiting[name] = message_to_proto(message).SerializeToString()
            self.sent += len(self._waiting[name])
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the nodes answer, one after another."""
        return [
            self._answer(self._waiting.pop(name)) for name in message_ids if name in self._waiting
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull their replies; no node is late."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, data: bytes) -> Message:
        message = message_from_proto(ProtoMessage.FromString(data))
        node = message.metadata.dst_node_id
        context = context_from_proto(ProtoContext.FromString(self.contexts[node]))
        try:
            reply = self.app(message, context)
            self.contexts[node] = context_to_proto(context).SerializeToString()
        except Exception as error:  # as Flower's runtimes do
            reason = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=reason), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(next(self._numbers))
        sent = message_to_proto(reply).SerializeToString()
        self.received += len(sent)
        return message_from_proto(ProtoMessage.FromString(sent))
