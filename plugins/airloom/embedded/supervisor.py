"""Runs the services of the embedded platform as child processes of one asyncio process.

Start it detached with `airloom up --embedded`. In this process:

    each service   waits for what it depends on, starts, is probed until ready, is watched, starts again
    control API    HTTP on a Unix socket (control_api.py)
    guard          a small process that leaves nothing behind if this one is killed (guard.py)
"""

from __future__ import annotations

import asyncio
import graphlib
import logging
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from airloom.embedded import guard
from airloom.embedded.dynamic import DynamicServices
from airloom.embedded.instance import Guard, InstanceLock, record_path, write_record
from airloom.embedded.keeper import Keeper, Timing
from airloom.embedded.ports import PortUse, check_ports, check_room, service_ports
from airloom.embedded.service import Service
from airloom.errors import AirloomError, ConflictError, NotFoundError, PlatformError
from airloom.hooks.supervisor import ServiceDefinition
from airloom.settings import Settings

log = logging.getLogger(__name__)

_PROBE_THREADS = 16


class Supervisor:
    """One installation's services.

    Raises:
        PlatformError: from the constructor, when the services' dependencies make no order.
    """

    def __init__(self, settings: Settings, services: Sequence[Service], *, timing: Timing | None = None) -> None:
        self.settings = settings
        self._timing = timing or Timing()
        self._services = ordered(services)
        self._lock = InstanceLock(settings)
        self._guard = Guard(settings, self._lock)
        self._threads = ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="probe")
        self._dynamic: DynamicServices
        self._keepers: dict[str, Keeper] = {}
        self._shutdown = asyncio.Event()
        self._changes = asyncio.Lock()

    @property
    def keepers(self) -> list[Keeper]:
        """Every service's keeper: static ones in the order of their start, then dynamic ones."""
        return list(self._keepers.values())

    def keeper(self, name: str) -> Keeper:
        """Raises NotFoundError."""
        if name not in self._keepers:
            raise NotFoundError(f"no service {name!r}", hint=f"there are: {', '.join(self._keepers) or 'none'}")
        return self._keepers[name]

    def prepare(self) -> None:
        """Take the lock, clear what an earlier start left behind, and check ports and room.

        Raises:
            PlatformError: the platform runs already, a port is taken, or there is no room.
        """
        self._lock.acquire()
        write_record(self.settings)
        self._guard.start()
        try:
            guard.end_members(self.settings.instance_id)
            self._dynamic = DynamicServices(self.settings)
            kept = [PortUse(kept.port, name) for name, kept in self._dynamic.items()]
            check_ports(self.settings, [*service_ports(self._services), *kept])
            check_room(self.settings)
        except BaseException:
            self.close()
            raise

    async def run(self) -> None:
        """Start everything and keep it running until `shutdown`; then stop everything, in reverse order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.shutdown)
        try:
            for service in self._services:
                self._keepers[service.name] = self._keep(service)
            for name, kept in self._dynamic.items():
                try:
                    self._keepers[name] = self._keep(self._dynamic.service(name, kept), dynamic=True)
                except AirloomError as error:
                    log.error("%s is not started: %s", name, error)
            while not self._shutdown.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._shutdown.wait(), 1.0)
                self._guard.ensure()
        finally:
            await self._stop_all()

    def shutdown(self) -> None:
        """Ask for the end."""
        self._shutdown.set()

    def close(self) -> None:
        """Leave no process, no socket and no record behind."""
        record_path(self.settings).unlink(missing_ok=True)
        sockets = self.settings.socket_path("x").parent
        if sockets != self.settings.run_dir:
            shutil.rmtree(sockets, ignore_errors=True)
        self._guard.release()
        self._lock.release()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def add(self, name: str, definition: ServiceDefinition) -> Keeper:
        """Start a dynamic service; no change when the same one is there.

        Raises:
            ConflictError: another one has that name, or the platform is being stopped.
            ConfigError, PlatformError: see `DynamicServices.add`.
        """
        async with self._changes:
            if self._shutdown.is_set():
                raise ConflictError("the platform is being stopped")
            kept = self._dynamic.get(name)
            if kept is not None and kept.definition == definition and name in self._keepers:
                return self._keepers[name]
            if kept is not None or name in self._keepers:
                raise ConflictError(f"a service {name!r} with another definition runs", hint="stop that one first")
            kept = self._dynamic.add(name, definition)
            self._keepers[name] = self._keep(self._dynamic.service(name, kept), dynamic=True)
            return self._keepers[name]

    async def remove(self, name: str) -> None:
        """Stop a dynamic service and forget it; no change when there is none.

        Raises:
            ConflictError: the service is a part of the platform itself.
        """
        async with self._changes:
            keeper = self._keepers.get(name)
            if keeper is not None and not keeper.dynamic:
                raise ConflictError(f"{name} is a part of the platform", hint="stop the whole with: airloom down")
            # Forgotten first: killed at this point, it does not come back.
            if self._dynamic.get(name) is not None:
                self._dynamic.remove(name)
        if keeper is not None:
            await keeper.stop()
            if self._keepers.get(name) is keeper:
                del self._keepers[name]

    def _keep(self, service: Service, *, dynamic: bool = False) -> Keeper:
        needed = [self._keepers[name] for name in service.depends_on]
        keeper = Keeper(service, self.settings, needed, self._threads, timing=self._timing, dynamic=dynamic)
        keeper.start()
        return keeper

    async def _stop_all(self) -> None:
        self._shutdown.set()
        stopped = {name: asyncio.Event() for name in self._keepers}

        async def stop(keeper: Keeper) -> None:
            keeper.hold()
            for other in self.keepers:
                if keeper.name in other.service.depends_on:
                    await stopped[other.name].wait()
            try:
                await keeper.stop()
            finally:
                stopped[keeper.name].set()

        await asyncio.gather(*(stop(keeper) for keeper in self.keepers))
        # What has left its parent's group: stage processes, hooks. Their services are gone.
        await asyncio.to_thread(guard.end_members, self.settings.instance_id)


def ordered(services: Sequence[Service]) -> list[Service]:
    """Services so that each stands behind what it depends on, otherwise in the given order.

    Raises:
        PlatformError: a name stands twice, is unknown, or the dependencies go round in a circle.
    """
    by_name = {service.name: service for service in services}
    if len(by_name) != len(services):
        raise PlatformError(f"a service stands twice: {', '.join(service.name for service in services)}")
    for service in services:
        for name in service.depends_on:
            if name not in by_name:
                raise PlatformError(f"service {service.name} depends on {name}, which there is not")
    sorter = graphlib.TopologicalSorter({service.name: service.depends_on for service in services})
    try:
        return [by_name[name] for name in sorter.static_order()]
    except graphlib.CycleError as error:
        raise PlatformError(f"services depend on each other in a circle: {' -> '.join(error.args[1])}") from error


async def supervise(
    settings: Settings,
    services: Sequence[Service],
    *,
    on_started: Callable[[], None] = lambda: None,
    timing: Timing | None = None,
) -> None:
    """Run the services until somebody asks for the end; `on_started` is called when the API listens.

    Raises:
        PlatformError: see `Supervisor.prepare`; nothing was started.
    """
    from airloom.embedded.control_api import ControlApi

    supervisor = Supervisor(settings, services, timing=timing)
    supervisor.prepare()
    api = ControlApi(supervisor)
    try:
        await api.start()
        on_started()
        await supervisor.run()
    finally:
        await api.stop()
        supervisor.close()
