"The script for a machine with a GPU runs here with toys on the CPU, and says what it leaves out."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which('bash') or os.name == 'nt', reason='needs bash')
QUICK = ['precision', 'flex', 'four_bits', 'nccl', 'train_135m_ours', 'train_135m_trl', 'answer_135m_ours', 'answer_135m_hf']


def gpu_sh(*words, cwd):
    env = dict(os.environ, PYTHON=sys.executable, OMP_NUM_THREADS='1')
    return subprocess.run(['bash', str(ROOT/'tests/bench/gpu.sh'), *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize('stages', [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=['quick', 'all'])
def test_dry_run(stages, tmp_path):
    done = gpu_sh('--dry-run', '--out', str(tmp_path/'a b'/'gpu.json'), *(['--stages', *stages] if stages else []), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path/'a b'/'gpu.json').read_text())
    assert list(report['stages']) == stages or stages is None and len(report['stages']) == 17
    for name, found in report['stages'].items():
        assert found['status'] == 'passed' or (found['status'], name.split('_')[-1]) == ('left out', 'trl'), (name, found)
    ours = report['stages']['train_135m_ours']
    assert ours['tokens_per_sec'] > 0 and ours['n_steps'] == 4 and 5 < ours['losses'][0] < 12
    assert report['compared']['answer_135m']['same_answers'] == '6 of 6'
    if 'tokens_per_sec' in report['stages']['train_135m_trl']: assert report['compared']['train_135m']['first_loss'][0] == pytest.approx(report['compared']['train_135m']['first_loss'][1], rel=.01)


def test_no_time_and_no_gpu(tmp_path):
    done = gpu_sh('--dry-run', '--minutes', '0.05', '--stages', 'nccl', '--out', str(tmp_path/'gpu.json'), cwd=tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path/'gpu.json').read_text())['stages'] == {'nccl': dict(status='left out', why='no time left')}
    import torch
    if torch.cuda.is_available(): return
    done = gpu_sh('--out', str(tmp_path/'gpu.json'), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith('gpu.sh: torch sees no CUDA GPU here')
