"""Chat templates as MoE models come with them, in short: each does what one of the known families does."""

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role in ['tool', 'ipython'] %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson(sort_keys=true, separators=(',', ':')) }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = messages[0]['content'] + '\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}""".replace("\n{%", "{%")

DEEPSEEK = """{% set ns = namespace(system='', tool=false) %}{%- for m in messages %}{%- if m['role'] == 'system' %}
{%- set ns.system = m['content'] %}{%- endif %}{%- endfor %}{{ bos_token ~ ns.system }}
{%- for m in messages %}{%- if m['role'] == 'system' %}{% continue %}{%- endif %}
{%- if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{%- endif %}
{%- if m['role'] == 'assistant' %}{%- set c = m['content'] or '' %}
{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1] %}{%- endif %}
{{- '<Assistant>' + c + eos_token }}{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"""

GENERATION = """{% for message in messages %}{% if message.role == 'assistant' %}{{ '<assistant>' }}
{%- generation %}{% if message.reasoning_content %}{{ '<think>' ~ message.thinking ~ '</think>' }}{% endif %}
{{- message.content if message.content is string else message.content | map(attribute='text') | join }}{{ eos_token }}
{%- endgeneration %}{{ '\n' }}{% else %}{{ '<' ~ message.role ~ '>' ~ (message.content | tojson) ~ '\n' }}
{%- endif %}{% if loop.index > 50 %}{% break %}{% endif %}{% endfor %}
{%- if documents %}{% for d in documents %}
{{- d | tojson(ensure_ascii=true, indent=2, sort_keys=true) }}{% endfor %}{% endif %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL, "deepseek": DEEPSEEK, "generation": GENERATION}

TALK = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "Add <them>."},
    {"role": "user", "content": "And two more? \u00e9\u4f60"},
    {"role": "assistant", "content": "Four, of course.", "thinking": "'2' & 2"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two \u00e9 <numbers>.",
            "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}}},
        },
    }
]
CALLS = [
    {"role": "system", "content": "Use the tools."},
    {"role": "user", "content": "One and one?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 1}}}],
        "reasoning": "a tool",
    },
    {"role": "tool", "name": "add", "content": "2"},
    {"role": "assistant", "content": "Two.", "tool_calls": None},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " and one?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
]
DIALOGUES = {
    "talk": {"messages": TALK},
    "system": {"messages": [{"role": "system", "content": " Be brief. "}, *TALK]},
    "calls": {"messages": CALLS, "tools": TOOLS},
    "parts": {"messages": PARTS},
    "documents": {"messages": TALK, "documents": [{"title": "\u00e9", "text": "<a>"}]},
    "variables": {"messages": TALK, "variables": {"enable_thinking": False, "date_string": "1 Jan 2000"}},
    "two calls": {"messages": [*CALLS[:2], {**CALLS[2], "tool_calls": CALLS[2]["tool_calls"] * 2}], "tools": []},
}
