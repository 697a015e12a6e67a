"""The least a grpc.aio server can do: send back the bytes it got. Run by benchmarks.latency as a process of its own."""

from __future__ import annotations

import asyncio
import sys

import grpc


async def serve(port: int) -> None:
    """Echo under the name of the real method until killed."""

    async def echo(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return raw

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(
        "nlu.v1.Nlu", {"Understand": grpc.unary_unary_rpc_method_handler(echo)}
    )
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
