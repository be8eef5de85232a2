"What a reader's browser would stumble over, found by reading the built pages and by opening them in a headless Chromium"
import functools
import shutil
import threading
from collections import defaultdict
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urljoin, urlsplit

LOADED = {'script': 'src', 'img': 'src', 'source': 'src', 'iframe': 'src', 'video': 'src', 'audio': 'src'}


class Links(HTMLParser):
    "Anchors of a page, where its links lead, and what it loads"
    def __init__(self, text):
        super().__init__()
        self.ids, self.leads, self.loads, self.pictures = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        got = dict(attrs)
        if got.get('id'): self.ids.add(got['id'])
        if tag == 'a' and got.get('name'): self.ids.add(got['name'])
        if tag == 'a' and got.get('href') is not None: self.leads.append(got['href'])
        if tag in LOADED and got.get(LOADED[tag]): self.loads.append(got[LOADED[tag]])
        if tag == 'link' and got.get('rel') in ('stylesheet', 'icon', 'preload', 'preconnect', 'modulepreload'): self.loads.append(got.get('href') or '')


def link_faults(folder):
    "Links and loaded files that lead nowhere, and all that would be fetched from elsewhere"
    pages = {p.relative_to(folder).as_posix(): Links(p.read_text(encoding='utf-8')) for p in sorted(folder.rglob('*.html'))}
    for page, found in pages.items():
        for uri in found.loads:
            if urlsplit(uri).scheme in ('http', 'https') or uri.startswith('//'): yield f'{page}: loads {uri} from elsewhere'
        for uri in found.leads + found.loads:
            parts = urlsplit(uri)
            if parts.scheme or uri.startswith('//'): continue
            target = unquote(urlsplit(urljoin(f'http://here/{page}', uri)).path.lstrip('/')) or 'index.html'
            if not (folder/target).is_file(): yield f'{page}: {uri} leads nowhere'
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f'{page}: {uri} has no such anchor'


def reachable(folder, start='index.html'):
    "Pages that a reader can click to from the front page"
    seen, todo = set(), [start]
    while todo:
        page = todo.pop()
        if page in seen or not (folder/page).is_file() or not page.endswith('.html'): continue
        seen.add(page)
        links = Links((folder/page).read_text(encoding='utf-8')).leads
        todo += [urlsplit(urljoin(f'http://here/{page}', u)).path.lstrip('/') for u in links if not urlsplit(u).scheme]
    return seen


def find_chromium():
    "The browser of the system, or None"
    return next((found for name in ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable') if (found := shutil.which(name))), None)


@contextmanager
def served(folder):
    "The folder behind an address of this machine"
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()
        server.server_close()


# Text is compared with the nearest painted background behind it; each pair of colours is reported once
MEASURE = '''() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m.slice(0, 3), 1] : m; };
  const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1-a[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4; }); return .2126*r+.7152*g+.0722*b; };
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) layers.push(c); if (c[3] === 1) break; }
    return layers.reverse().reduce((b, c) => over(c, b), [255, 255, 255, 1]);
  };
  const faults = {}, walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let n = 0;
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement;
    if (!text || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE'].includes(e.tagName) || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = getComputedStyle(e), back = behind(e);
    let alpha = 1;
    for (let a = e; a; a = a.parentElement) alpha *= Number(getComputedStyle(a).opacity);
    const own = parse(style.color); own[3] *= alpha;
    const a = light(over(own, back)), b = light(back), ratio = (Math.max(a, b)+.05)/(Math.min(a, b)+.05);
    n += 1;
    if (ratio < 4.5) faults[`${style.color} on ${back.slice(0, 3)}`] ??= `${ratio.toFixed(2)} <${e.tagName.toLowerCase()} class="${e.className}"> ${text.slice(0, 30)}`;
  }
  const page = document.scrollingElement;
  const wide = page.scrollWidth > page.clientWidth ? [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > page.clientWidth + 1).slice(0, 3)
    .map(e => `<${e.tagName.toLowerCase()} class="${e.className}">`) : [];
  return {n, faults, scroll: page.scrollWidth - page.clientWidth, wide};
}'''


def browser_faults(folder, pages, chromium, widths=(390, 1280), themes=('light', 'dark')):
    "What Chromium says of each page: errors, files not found, what is wider than the window, and text that is hard to read"
    from playwright.sync_api import sync_playwright # optional: it belongs to the site's tools
    faults, n_texts = defaultdict(set), 0
    with served(folder) as base, sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        for theme in themes:
            tab = browser.new_page(color_scheme=theme)
            here = []
            tab.on('console', lambda m: m.type in ('error', 'warning') and faults[f'console: {m.text}'].add(here[-1]))
            tab.on('pageerror', lambda e: faults[f'error: {e}'].add(here[-1]))
            tab.on('requestfailed', lambda r: faults[f'not loaded: {r.url}'].add(here[-1]))
            tab.on('request', lambda r: r.url.startswith((base, 'data:', 'blob:')) or faults[f'from elsewhere: {r.url}'].add(here[-1]))
            for page in pages:
                here.append(page)
                tab.set_viewport_size({'width': widths[0], 'height': 844})
                tab.goto(base+page)
                for width in widths:
                    tab.set_viewport_size({'width': width, 'height': 844})
                    found = tab.evaluate(MEASURE)
                    n_texts += found['n']
                    if found['scroll'] > 0: faults[f"{width} px: {found['scroll']} px too wide: {', '.join(found['wide'])}"].add(page)
                    for pair, what in found['faults'].items(): faults[f'{theme}: {pair}: contrast {what}'].add(page)
            tab.close()
        browser.close()
    return {fault: sorted(where) for fault, where in faults.items()}, n_texts
