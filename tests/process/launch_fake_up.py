"""`stagewire up` with fake stages: launch_fake_up.py FOLDER HTTP_PORT TIMEOUTS_AS_JSON BEHAVIOUR...

`serve+held` is a stage that serves and whose standbys are `standby:held`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from stagewire.commands.screen import open_screen
from stagewire.errors import StagewireError
from stagewire.folders import private_folder
from stagewire.launch.api import Api, Served
from stagewire.launch.logs import LogFolder
from stagewire.launch.resources import Resources
from stagewire.launch.spec import Launch, StageSpec, Timeouts, place_stages
from stagewire.launch.supervisor import Supervisor
from stagewire.observe.streams import keep_writing
from stagewire.plan.ranges import split_evenly

FAKE_STAGE = Path(__file__).with_name("launch_fake_stage.py")


def main() -> int:
    keep_writing()
    folder, port, timeouts, *behaviours = sys.argv[1:]
    settings = json.loads(timeouts)
    restarts = int(settings.pop("restarts", 2))
    has_standbys = bool(settings.pop("standby", False))
    specs = place_stages(split_evenly(30, len(behaviours)), 15550)

    def command(spec: StageSpec) -> list[str]:
        serving, _, how = behaviours[spec.index].partition("+")
        behaviour = f"standby:{how}" if spec.stands_by else serving
        return [sys.executable, str(FAKE_STAGE), str(spec.index), port, behaviour]

    def serving(api: Api, served: Served) -> str:
        heard = Path(folder) / "serving"  # a FIFO, where a test cannot read what is printed
        if heard.exists():
            heard.write_text("serving\n")
        return f"serving {served.model} ({served.task}) at {api.place} from {private}"

    with private_folder() as private:
        launch = Launch(
            specs,
            command,
            [Resources({"FAKE_DIR": folder})] * len(specs),
            Api("127.0.0.1", int(settings.pop("api_port", port))),
            source=Path("fake-model"),
            has_chat_template=False,
            logs=LogFolder.claim(Path(os.environ.get("FAKE_LOGS", folder))),
            timeouts=Timeouts(**settings),
            max_restarts=restarts,
            has_standbys=has_standbys,
        )
        supervisor = Supervisor(launch, open_screen(specs), private, serving)
        try:
            return asyncio.run(supervisor.run())
        except StagewireError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
