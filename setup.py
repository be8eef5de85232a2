"Packaging for sft_nb: everything it needs to know stands in settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(HERE/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=(HERE/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['sft_nb*']), package_data={'sft_nb': ['gpt2_bpe/*', 'py.typed']}, include_package_data=True,
    python_requires=f">={cfg['min_python']}", install_requires=shlex.split(cfg['requirements']),
    extras_require={'dev': shlex.split(cfg['dev_requirements'])} |
        {name.removeprefix('extra_'): shlex.split(cfg[name]) for name in cfg if name.startswith('extra_')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts']), 'nbdev': ['sft_nb=sft_nb._modidx:d']},
)
