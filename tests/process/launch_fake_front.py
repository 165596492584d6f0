"""`stagewire front` with fake stages: launch_fake_front.py FOLDER HEAD_PORT PUBLIC_PORT BEHAVIOUR..."""

from __future__ import annotations

import sys
from pathlib import Path

from stagewire.errors import StagewireError
from stagewire.folders import private_folder
from stagewire.launch.api import Api
from stagewire.launch.front import listen, run_in_loop, serve_launch
from stagewire.launch.logs import LogFolder
from stagewire.launch.spec import Resources, StageSpec, place_stages
from stagewire.launch.up import Launch
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
    launch = Launch(specs, command, resources, head, Path("fake-model"), logs, False, 60.0, 0, False)
    try:
        with listen("127.0.0.1", public.port) as sock, private_folder() as private:
            return run_in_loop(serve_launch(launch, public, sock, private))
    except StagewireError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
