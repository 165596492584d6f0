"""`stagewire front` with fake stages: launch_fake_front.py FOLDER HEAD_PORT PUBLIC_PORT BEHAVIOUR..."""

from __future__ import annotations

import sys
from pathlib import Path

from stagewire.commands.front import serve_stages
from stagewire.errors import StagewireError
from stagewire.folders import private_folder
from stagewire.front.server import listen
from stagewire.launch.api import Api
from stagewire.launch.logs import LogFolder
from stagewire.launch.resources import Resources
from stagewire.launch.spec import Launch, StageSpec, Timeouts, place_stages
from stagewire.plan.ranges import split_evenly

FAKE_STAGE = Path(__file__).with_name("launch_fake_stage.py")


def main() -> int:
    folder, head_port, public_port, *behaviours = sys.argv[1:]
    specs = place_stages(split_evenly(30, len(behaviours)), 15550)

    def command(spec: StageSpec) -> list[str]:
        return [sys.executable, str(FAKE_STAGE), str(spec.index), head_port, behaviours[spec.index]]

    resources = [Resources({"FAKE_DIR": folder})] * len(specs)
    head, public = Api("127.0.0.1", int(head_port)), Api("127.0.0.1", int(public_port))
    logs = LogFolder.claim(Path(folder))
    launch = Launch(
        specs,
        command,
        resources,
        head,
        source=Path("fake-model"),
        has_chat_template=False,
        logs=logs,
        timeouts=Timeouts(start=60.0),
        max_restarts=0,
        has_standbys=False,
    )
    try:
        with listen("127.0.0.1", public.port) as sock, private_folder() as private:
            return serve_stages(launch, public, sock, private)
    except StagewireError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
