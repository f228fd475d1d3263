"""Chat templates in the manner of well-known models, and conversations to render with them."""

from __future__ import annotations

from typing import Any

LLAMA2 = """{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for turn in turns -%}
{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if turn.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + turn.content.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + turn.content.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today is " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one tool call at once") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" + eos_token }}
    {%- else %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{% generation %}
{{ message['content'] }}
{% endgeneration %}
{{ '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

QWEN = """{%- set ns = namespace(last=-1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user"
        and not (message.content is string and message.content.startswith('<r>')) %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=true) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if reasoning and loop.index0 > ns.last %}
        {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<call>' }}{{- call.name }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISTRAL = """{%- set turns = messages | selectattr('role', 'ne', 'system') | list -%}
{{- bos_token -}}
{%- for turn in turns -%}
{%- if turn.role == 'user' -%}
{%- if loop.last and documents is not none -%}
[DOCS]{% for d in documents %}{{ d['title'] ~ ': ' ~ d['text'] }}{% endfor %}[/DOCS]{%- endif -%}
{{- '[INST]' + turn.content + '[/INST]' -}}
{%- elif turn.role == 'assistant' and turn.content is defined -%}
{{- ' ' + turn.content + eos_token -}}
{%- else -%}{% continue %}{%- endif -%}
{%- endfor -%}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'stop' %}
{% break %}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """{{ bos_token }}{% macro turn(role, text) -%}
<start_of_turn>{{ role }}
{{ text | trim }}<end_of_turn>
{% endmacro %}{% for message in messages %}
{{ turn('model' if message.role == 'assistant' else message.role, message.content or '') }}
{%- endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

NAMES = (
    "{{ [bos_token, eos_token, unk_token, pad_token] | join('|') }}{{ sep_token is defined }}{{ tools is none }}"
    "{{ documents is none }}{{ dict(a=1).a }}{{ dict.fromkeys(['b'], 2)['b'] }}"
)

TEMPLATES = {
    "llama 2": LLAMA2,
    "llama 3": LLAMA3,
    "chatml": CHATML,
    "qwen": QWEN,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "names": NAMES,
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Wie ist's? <b>é</b> & 日本", "parameters": {"type": "object"}},
    },
    {"type": "function", "function": {"name": "a", "parameters": {"z": [1, 2.5, None, True], "y": {}}}},
]
DOCUMENTS = [{"title": "Birds", "text": "A hen."}, {"title": "Fish", "text": "A cod."}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 1}}}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hello <b>\n"}],
    "system": [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi"}],
    "three": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?\n", "name": None},
        {"role": "user", "content": "日本語 🤗 'quoted' \"twice\""},
    ],
    "answered": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nYes?  "}],
    "reasoned": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "reasoning": "It is."}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "12 °C"},
    ],
    "stopped": [{"role": "user", "content": "a"}, {"role": "stop", "content": "b"}, {"role": "user", "content": "c"}],
    "wrong order": [{"role": "assistant", "content": "Hi"}],
}
