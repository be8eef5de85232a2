"""What a run meets when the disk, the clock, the memory or somebody else interferes. Each change that `sft_nb run` makes to its folder is listed by a C library
between Python and the system (faulty.c), and at each the process is killed, or the disk is full: the same command with --resume then ends with the
files of a run that was left alone, to the last bit, times aside."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_proofs import TOY

HERE = Path(__file__).resolve().parent
WORDS = ['run', '--data', 'mine.json', '--model', 'toy', '--template', 'plain', '--dtype', 'float32', '--max-new', '4', '--no-preflight', '--epochs', '2',
         '--eval-every', '5', '--best', '--name', 'x']
TIMES = re.compile(rb'("(?:secs|tokens_per_sec|answers before|answers after|training|memory_gib)": )[\d.e-]+|\d+ s\b')
LOGS = 'terminal.log', 'log.jsonl', 'partial.jsonl' # grow line by line; a torn last line is cut off
pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux') or not shutil.which('gcc'), reason='needs Linux and gcc')


class Lab:
    "Starts runs in which something goes wrong, each in a child of a process that has imported everything"
    def __init__(self, home, library):
        self.home = home
        self.run = home/'runs/x'
        env = dict(os.environ, LD_PRELOAD=str(library), OMP_NUM_THREADS='1', PYTHONPATH=str(HERE.parent), HF_HUB_OFFLINE='1')
        self.process = subprocess.Popen([sys.executable, str(HERE/'faulty.py'), str(home), str(library)], env=env, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        assert json.loads(self.process.stdout.readline()) == {}

    def ask(self, *more, **what):
        print(json.dumps({'words': [*WORDS, *more]} | what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def afresh(self, *more, **what):
        shutil.rmtree(self.home/'runs', ignore_errors=True)
        return self.ask(*more, **what)

    def files(self):
        "What lies in the run folder, without times and what was said on the terminal"
        found = {}
        for path in self.run.rglob('*'):
            if path.is_dir() or path.name == 'terminal.log': continue
            data = path.read_bytes()
            found[path.relative_to(self.run).as_posix()] = data if path.suffix in ('.png', '.safetensors') else TIMES.sub(rb'\g<1>0', data)
        return found


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A `Lab` that knows the files and the calls of a run that was left alone"
    home = tmp_path_factory.mktemp('faults')
    subprocess.run([sys.executable, '-c', TOY], cwd=home, check=True, env=dict(os.environ, PYTHONPATH=str(HERE.parent), OMP_NUM_THREADS='1'))
    library = tmp_path_factory.mktemp('library')/'faulty.so'
    subprocess.run(['gcc', '-shared', '-fPIC', '-O1', '-w', '-o', str(library), str(HERE/'faulty.c'), '-ldl'], check=True)
    lab = Lab(home, library)
    done = lab.afresh(fault='trace')
    assert done['status'] == 0, done['complained']
    lab.calls, lab.wanted = [line.split(' ', 2)[1:] for line in done['trace'].splitlines()], lab.files()
    assert {'open', 'write', 'rename', 'mkdir', 'unlink'} <= {call for call, _ in lab.calls} and len(lab.calls) > 200
    yield lab
    lab.process.kill()


def one_line(done):
    lines = done['complained'].splitlines()
    assert done['status'] == 2 and len(lines) == 1, done['complained']
    return lines[0]


def check_whole(lab):
    "No file is half a file: what is there under its own name is what a whole run writes, or reads as its kind"
    for name, data in lab.files().items():
        if name.endswith(LOGS) or any(part.startswith('.') for part in Path(name).parts) or data == lab.wanted.get(name): continue
        if name.endswith('.json'): json.loads(data)
        elif name.endswith('.safetensors'):
            size = int.from_bytes(data[:8], 'little')
            ends = [t['data_offsets'][1] for k, t in json.loads(data[8:8+size]).items() if k != '__metadata__']
            assert len(data) == 8 + size + max(ends), name
        else: raise AssertionError(f'{name} is neither new nor whole')


def check_resumed(lab, at):
    done = lab.ask('--resume')
    assert done['status'] == 0, (lab.calls[at-1], done['complained'])
    found = lab.files()
    odd = [name for name in {*found, *lab.wanted} if found.get(name) != lab.wanted.get(name)]
    assert not odd, (at, lab.calls[at-1], odd)


def kill_at(lab, at):
    assert lab.afresh(fault='kill', at=at)['status'] == -9
    if lab.run.exists(): check_whole(lab)
    check_resumed(lab, at)


def fill_at(lab, at):
    done = lab.afresh(fault='full', at=at)
    if done['status']: # the last calls may be ones that need no room
        assert re.search(r'No space left on device\W.*make room', one_line(done)) and 'resume' in done['complained'], done['complained']
    if lab.run.exists(): check_whole(lab)
    check_resumed(lab, at)


def spread(calls, n, seed):
    "Some of the calls, of every kind, in every part of the run"
    draw = random.Random(seed)
    return [draw.randint(len(calls)*i//n + 1, len(calls)*(i + 1)//n) for i in range(n)]


def test_no_file_is_written_in_its_place(lab):
    "Every file that is opened for writing is a log, or bears a name that nobody believes until it is renamed"
    for call, path in lab.calls:
        name = Path(path).name
        if call != 'open' or name.endswith(LOGS): continue
        assert re.search(r'/\.[^/]+', path[path.index('runs'):]), path


def test_killed_at_some_of_all_writes(lab):
    for at in spread(lab.calls, 4, 1): kill_at(lab, at)


def test_a_full_disk_at_some_of_all_writes(lab):
    for at in spread(lab.calls, 2, 2): fill_at(lab, at)


@pytest.mark.slow
@pytest.mark.parametrize('part', range(10))
def test_killed_at_every_write(lab, part):
    for at in range(1 + part, len(lab.calls) + 1, 10): kill_at(lab, at)


@pytest.mark.slow
@pytest.mark.parametrize('part', range(10))
def test_a_full_disk_at_every_write(lab, part):
    for at in range(1 + part, len(lab.calls) + 1, 10): fill_at(lab, at)


def test_between_the_answers_and_the_end_of_their_lines(lab):
    "The finished file is there, and so are the lines it was made of"
    kill_at(lab, next(i for i, (call, path) in enumerate(lab.calls, 1) if call == 'unlink' and path.endswith('partial.jsonl')))


def test_read_only(lab):
    line = one_line(lab.afresh(fault='readonly'))
    assert 'Read-only file system; make it writable' in line and not (lab.home/'runs').exists()


def test_a_clock_that_jumps_back(lab):
    "An hour back each time that somebody looks"
    back = 'import time\nheld = [1e9]\ndef back():\n    held[0] -= 3600\n    return held[0]\ntime.time = back'
    done = lab.afresh(prepare=back)
    assert done['status'] == 0 and lab.files() == lab.wanted, done['complained']
    assert lab.afresh(fault='kill', at=150, prepare=back)['status'] == -9
    check_resumed(lab, 150)


def test_two_runs_in_one_folder(lab):
    import fcntl
    assert lab.afresh(fault='kill', at=150)['status'] == -9
    with open(lab.run/'terminal.log', 'ab') as other: # as the other run has it
        fcntl.flock(other, fcntl.LOCK_EX)
        assert 'runs/x: another run is writing to it; wait for it, or choose another --out' in one_line(lab.ask('--resume'))
    check_resumed(lab, 150)


@pytest.mark.slow
def test_a_limit_of_memory(lab):
    "Wherever it is reached, there is one line; which library reaches it differs between machines, hence not for every change"
    limit = "import resource\nnow = int(open('/proc/self/statm').read().split()[0])*4096\nresource.setrlimit(resource.RLIMIT_AS, 2*(now + {},))"
    for mib in (1, 4):
        assert 'the memory is full' in one_line(lab.afresh(prepare=limit.format(mib<<20)))
    shutil.rmtree(lab.home/'runs', ignore_errors=True)
    check_resumed(lab, 1)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_of_whole_runs(lab):
    draw = random.Random(19)
    whole = lab.afresh()['secs']
    kills, ended = 0, 0
    while kills < 50:
        done = lab.afresh(secs=draw.uniform(0, whole))
        while done['status'] == -9 and kills < 50: # and again, while it is resumed
            kills += 1
            if lab.run.exists(): check_whole(lab)
            done = lab.ask('--resume', secs=draw.uniform(0, whole))
        ended += done['status'] == 0
        check_resumed(lab, 1)
    assert ended and kills == 50
