"""What a reset costs where there are as many task plans as in the real data.

    python tests/crowded.py ASSETS FOLDER PLANS SCENES   # the real train split has 10000 and 63

copies the generated apartment ASSETS to FOLDER, and there multiplies the plans of train to close
the fridge and to close the drawer, PLANS of each, spread over SCENES copies of a scene. Prints as
json the seconds of each reset of the fridge's environment, and the files of rearrange/ that the
reset opens.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

RESETS = 10


def grow(rearrange: Path, plans: int, scenes: int):
    """Multiply the plans, and with them episode files, start poses and scenes."""
    import torch
    from mani_skill.utils.scene_builder.replicacad.scene_builder import DATASET_CONFIG_DIR

    listed = json.loads(Path(DATASET_CONFIG_DIR, "scene_configs.json").read_text())
    names, folder = listed["staging_scenes"][:scenes], rearrange.parent / "configs/scenes"
    for name in names[1:]:
        shutil.copy(folder / names[0], folder / name)
    spawn_file = rearrange / "spawn_data/set_table/close/train/spawn_data.pt"
    starts, many = torch.load(spawn_file), {}
    for file in (rearrange / "task_plans/set_table/close/train").glob("*.json"):
        content = json.loads(file.read_text())
        few, content["plans"] = content["plans"], []
        for i in range(plans):
            plan, scene, uid = few[i % len(few)], names[i % scenes], f"{file.stem}-{i}"
            episode = json.loads((rearrange / plan["init_config_name"]).read_text())
            name = f"train/set_table/many_{i}.json"
            (rearrange / name).write_text(json.dumps(episode | {"scene_id": scene}))
            own = starts[plan["subtasks"][0]["uid"]]
            many[uid] = {key: value[:10].clone() for key, value in own.items()}
            plan = {"subtasks": [plan["subtasks"][0] | {"uid": uid}], "build_config_name": scene}
            content["plans"].append(plan | {"init_config_name": name})
        file.write_text(json.dumps(content))
    torch.save(many, spawn_file)


def measure(rearrange: Path) -> dict:
    from simulation.env import SubtaskEnvs

    opened, resets, files = [], [], []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    env = SubtaskEnvs("set_table", "close", "fridge", obs_mode="state_dict")
    for seed in range(RESETS):
        opened.clear()
        start = time.perf_counter()
        env.reset([seed])
        resets.append(round(time.perf_counter() - start, 3))
        files.append(sum(name.startswith(str(rearrange)) for name in opened))
    return {"resets": resets, "files": files}


def main(assets: Path, folder: Path, plans: int, scenes: int):
    shutil.copytree(assets, folder)
    (folder / "household.json").unlink()  # copies of a scene are not the generator's: a download
    os.environ["MS_ASSET_DIR"] = str(folder)  # before mani_skill is imported
    rearrange = folder / "data/scene_datasets/replica_cad_dataset/rearrange"
    grow(rearrange, plans, scenes)
    print(json.dumps(measure(rearrange)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).absolute(), int(sys.argv[3]), int(sys.argv[4]))
