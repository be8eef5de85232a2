"A small run that `torchrun` can start: python -m torch.distributed.run --nproc-per-node 2 tests/toy_run.py FOLDER '{\"epochs\": 2}'"
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import torch

from test_training import CFG, DATA, tiny
from sft_nb.basics import InputError
from sft_nb.sharding import whole_weights
from sft_nb.steps import processes
from sft_nb.run import train


def main(folder, settings, resume='', die=''):
    torch.set_num_threads(1)
    model, cfg = tiny(), replace(CFG, **(dict(best=False) | json.loads(settings)))
    with processes() as world:
        def last_words(entry, model):
            if entry.step == int(die): os.kill(os.getpid(), signal.SIGKILL)
        try: log = train(model, *DATA, cfg, Path(folder)/'run', hooks=[last_words] if die else (), resume=bool(resume), say=lambda *_: None)
        except InputError as e:
            print(f'process {world.rank}: {e}', flush=True)
            raise
        whole = whole_weights(model)
        digest = hashlib.sha256(b''.join(t.numpy().tobytes() for t in whole.values())).hexdigest()
        print(f'process {world.rank}: {digest}', flush=True)
        if world.rank == 0:
            torch.save(whole, Path(folder)/'weights.pt')
            (Path(folder)/'losses.json').write_text(json.dumps([[s.loss for s in log.steps], [v.loss for v in log.vals]]))


if __name__ == '__main__': main(*sys.argv[1:])
