"""The viewer's design: Streamlit's theme options, and our own CSS."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from xattn.pictures.design import DARK, FONT, LEGENDS, LENGTHS, LIGHT, VARIABLES, Colours
from xattn.runtime.names import visible


def _options(colours: Colours) -> dict[str, str]:
    """The colours as Streamlit's theme options."""
    return {
        "primaryColor": colours.accent,
        "backgroundColor": colours.ground,
        "secondaryBackgroundColor": colours.panel,
        "textColor": colours.text,
        "linkColor": colours.link,
        "borderColor": colours.line,
    }


CONFIG: dict[str, Any] = {
    "theme.font": FONT,
    "theme.headingFont": FONT,
    "theme.headingFontSizes": ["1.45rem", "1.15rem", "1.05rem"],
    "theme.baseRadius": LENGTHS["corner"],
    "theme.showWidgetBorder": True,
    "theme.paddingTop": "1rem",
    "theme.paddingBottom": "3rem",
    **{f"theme.light.{name}": value for name, value in _options(LIGHT).items()},
    **{f"theme.dark.{name}": value for name, value in _options(DARK).items()},
}
"""Options for ``streamlit.starlette.App.run(config=...)``."""

STYLE = (
    f"<style>:root{{{VARIABLES}}}{LEGENDS}"
    """
[data-testid=stMainBlockContainer]{padding-inline:max(clamp(1rem,3vw,2.5rem),
env(safe-area-inset-left),env(safe-area-inset-right))}
[data-testid=stMain] :is(h1,h2,h3){overflow-wrap:anywhere;unicode-bidi:plaintext}
[data-testid=stMain] h1{padding:.25rem 0 .75rem}
/* Streamlit's greys are below a contrast of 4.5 on the light ground. */
[data-testid=stCaptionContainer],.stButton button:not(:disabled) kbd{color:var(--quiet);opacity:1}
[data-testid=stCaptionContainer] code{color:inherit}
[data-testid=stVegaLiteChart] svg text:not([opacity="0"]){fill:var(--quiet)}
[data-testid=stVegaLiteChart] svg .role-title text{fill:currentColor}
[data-testid=stCode] .token,[data-testid=stJson] .variable-value *{color:inherit!important}
[data-testid=stBaseButton-primary]{color:var(--on-accent)}
[data-testid=stMultiSelect] [data-tag]{background:color-mix(in srgb,var(--accent) 14%,transparent);
color:inherit}
[data-testid=stMultiSelect] .react-aria-ComboBox>div{height:auto;max-height:none;min-height:2.5rem}
[data-testid=stMain] [data-testid=stButtonGroup] button{min-height:2.5rem}
[data-testid=stMultiSelectTagsContainer]{flex-wrap:wrap;height:auto;min-width:0;flex:1;
overflow:visible;mask-image:none}
[data-testid=stMultiSelect] [data-tag]{max-width:100%}
.st-key-gallery-chips [data-testid=stBaseButton-secondary]{min-height:1.9rem;padding:.1rem .7rem;
border-radius:1rem;border-color:transparent;background:color-mix(in srgb,var(--accent) 14%,transparent)}
.st-key-gallery-chips [data-testid=stBaseButton-secondary]:hover{border-color:var(--accent)}
.st-key-gallery-histogram [data-testid=stElementToolbar]{display:none}
/* Streamlit draws an empty radio button in the colour of borders, below a contrast of 3 on both grounds. */
[data-testid=stRadioOption]:not([data-selected])>div>div:first-child{border-color:var(--quiet)}
/* A list is as wide as its box, which cuts off what is longer. */
[data-testid=stSelectboxVirtualDropdown]{min-width:min(17rem,100vw - 2rem)}
[data-testid=stSelectboxVirtualDropdown] [role=option]>div{text-overflow:ellipsis}
[data-testid^=stTopNav] a:focus-visible,[data-testid^=stSidebarNav] a:focus-visible{
outline:2px solid var(--accent);outline-offset:1px}
/* The chip of the open pack lies in the header, beside Streamlit's menu of pages. */
[data-testid=stHeader]{padding-inline-end:18rem}
.st-key-pack-chip{position:fixed;inset:.75rem 1rem auto auto;z-index:999990;width:auto!important}
.st-key-pack-chip button{min-height:2.25rem;border-radius:1.2rem;max-width:16rem;background:var(--panel)}
.st-key-pack-chip button div:has(p){min-width:0}
.st-key-pack-chip button p{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.st-key-image-bar kbd{display:none}
.st-key-image-title{row-gap:0!important}
.st-key-image-title .name{margin:0}
.st-key-image-title h3{padding:0}
/* The bar of the chosen photos lies over the foot of every page. */
.st-key-chosen-bar{position:fixed;inset:auto 0 1rem;margin-inline:auto;z-index:999970;
width:max-content!important;max-width:calc(100vw - 1rem);padding:.4rem .9rem;background:var(--panel);
border:1px solid var(--line);border-radius:var(--corner-large);box-shadow:0 2px 12px rgb(0 0 0/.25)}
.st-key-bottom-bar,.st-key-page-keys{display:none}
[data-testid=stMainBlockContainer]>div>[data-testid=stLayoutWrapper]:has(
.st-key-pack-chip,>.st-key-bottom-bar){position:absolute}
/* Below this width Streamlit puts the pages into a sidebar, in whose place the bar below is. */
@media(max-width:768px){
[data-testid=stSidebar],[data-testid=stExpandSidebarButton]{display:none}
[data-testid=stHeader]{padding-inline-end:0}
.st-key-pack-chip{inset:.5rem auto auto 1rem}
.st-key-pack-chip button{max-width:calc(100vw - 2rem);min-height:2.75rem}
[data-testid=stMainBlockContainer]{padding-bottom:calc(5.5rem + env(safe-area-inset-bottom))}
.st-key-chosen-bar{bottom:calc(4.25rem + env(safe-area-inset-bottom));padding-inline:.5rem}
.st-key-chosen-bar [data-testid=stHorizontalBlock]{gap:.375rem}
.st-key-chosen-bar .stPopover button div[aria-hidden]{display:none}
.st-key-bottom-bar{display:flex;position:fixed;inset:auto 0 0;z-index:1000100;flex-wrap:nowrap!important;
justify-content:space-evenly;background:var(--panel);border-top:1px solid var(--line);
padding:.125rem .25rem env(safe-area-inset-bottom)}
[data-testid=stPopoverBody]{padding-bottom:4.5rem}
.st-key-bottom-bar>*{flex:1 1 0!important;min-width:0!important;width:auto!important}
.st-key-bottom-bar :is(a,button){width:100%;min-height:3.25rem;padding:.25rem 0;justify-content:center;
background:none;border:0}
.st-key-bottom-bar :is(a,button span[data-has-shortcut]){flex-direction:column;gap:.1rem}
.st-key-bottom-bar :is([data-testid=stVerticalBlock],[data-testid=stLayoutWrapper],.stPopover,
.stPopover>div){width:100%!important}
.st-key-bottom-bar :is(a,button) p{font-size:.75rem;line-height:1.2;white-space:nowrap}
.st-key-bottom-bar-others a{min-height:var(--touch)}
.st-key-bottom-bar button{padding-bottom:.75rem}
.st-key-bottom-bar button div[aria-hidden]{display:none}
.st-key-bottom-bar-here :is(a,button) *{color:var(--accent);font-weight:600}
.st-key-bottom-bar :is(a,button):focus-visible{outline:2px solid var(--accent);outline-offset:-3px}
}
[data-testid=stPopoverBody] [data-testid=stButtonGroup] button{padding-inline:.55rem}
@media(max-width:640px){.stButton kbd{display:none}
.st-key-image-bar{gap:.5rem!important}
.st-key-image-bar :is(.st-key-go_gallery,.st-key-go_Previous,.st-key-go_Next) p{font-size:0}
.st-key-gallery-toolbar>*{flex:1 1 9rem!important;width:auto!important}
[data-testid=stMain] :is(.stButton,.stPopover) button{padding-inline:.5rem}}
[data-xattn-lost] [data-testid=stMarkdownContainer],[data-xattn-lost] pre{display:none}
[data-xattn-lost]::after{content:"The viewer does not answer. If xattn app has stopped, start it again; "
"this page then goes on by itself."}
dialog.xattn-keys{border:1px solid var(--line);border-radius:var(--corner-large);padding:1rem 1.5rem;
background:var(--panel);color:inherit;max-width:min(34rem,92vw)}
.xattn-keys h2{margin:0 0 .5rem;padding:0}
.xattn-keys dl{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.25rem;margin:0 0 1rem}
.xattn-keys dt{font-weight:600}.xattn-keys dd{margin:0}
.xattn-keys button{min-height:2.25rem;padding:0 1rem;border:1px solid var(--line);
border-radius:var(--corner);background:none;color:inherit;font:inherit;cursor:pointer}
.example{margin:0;max-width:44rem}
.example img{display:block;width:100%;border-radius:var(--corner-large)}
.example figcaption{margin-top:var(--gap);font-size:.875rem;color:var(--quiet)}
.name{margin:0 0 -1rem;font-size:1.45rem;line-height:1.2}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem;margin:0;
padding:0!important;font-size:.875rem}
.facts dt{opacity:.75}.facts dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
@media(max-width:480px){[data-testid=stMain] .stHtml dl.facts{grid-template-columns:1fr}
[data-testid=stMain] .facts dd{margin-bottom:.4rem}}
</style>"""
)
"""CSS for all pages; ``name`` is used by :func:`name_html`, ``facts`` by :func:`facts_html`."""


# As in components/grid.js.
_MARKS = re.compile(r"\S(?!(?<=\d[eE])[-+]\d)[-_/+](?=[^-_./,+\s])|\S[.,](?=[^-_./,+\s\d])")


def name_html(name: object) -> str:
    """A file name as a page's title; a long one breaks after punctuation, not within a word."""
    parts = _MARKS.sub("\\g<0>\0", visible(" ".join(str(name).split()))).split("\0")
    return f'<h1 class="name">{"<wbr>".join(map(html.escape, parts))}</h1>'


def facts_html(facts: Mapping[str, object]) -> str:
    """A list of terms with their values; terms whose value is None are left out."""
    terms = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return f'<dl class="facts">{terms}</dl>'
