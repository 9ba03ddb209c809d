"""Small chat templates that behave as those of well-known families do in what matters to a loss mask: written
for these tests, with the marks of ChatML where a family has marks of its own.
"""

from __future__ import annotations

# DeepSeek-R1: thoughts are cut out of every turn; other roles are not written; the prompt opens thoughts.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set c = m['content'] or '' %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>A:{{ c }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>A:<think>\n{% endif %}"
)

# Qwen3: tools, calls as JSON of an object, thoughts (in or beside the content) behind the last question only.
QWEN3 = """
{%- if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content if m.content is string else '' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- said.lstrip('\\n') }}
{%- for c in m.tool_calls or [] %}
{%- set f = c.function if c.function else c %}
{{- '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Phi-3: the last turn ends with its mark and the end of text, the others with the mark alone.
PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# The same with the end of text in place of the last turn's mark, and with marks that are no tokens.
PHI3_OTHER_END = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% else %}[end]\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# Llama-3: any role, trimmed; one call per turn, from an object; no content beside a call.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{% if m['tool_calls'] %}"
    '{"name": "{{ m[\'tool_calls\'][0].function.name }}", '
    "\"parameters\": {{ m['tool_calls'][0].function.arguments | tojson }}}"
    "{% else %}{{ m['content'] | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)

# Mistral: no generation prompt, the system prompt stands in the last question, tool results are JSON.
MISTRAL = (
    "{% set chat = messages %}{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set chat = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in chat %}{% if m['role'] == 'user' %}"
    "[INST] {{ system if loop.last or loop.revindex0 == 1 else '' }}{{ m['content'] }}[/INST]"
    "{% elif m['tool_calls'] %}[CALLS] [{% for c in m['tool_calls'] %}{{ c.function | tojson }}{% endfor %}]"
    "{{ eos_token }}"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}[RESULT] {{ {'content': m['content']} | tojson }}[/RESULT]"
    "{% else %}{{ raise_exception('no such role: ' + m['role']) }}{% endif %}{% endfor %}"
)

# DeepSeek-V3: arguments are put between texts, so they must be text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['tool_calls'] %}"
    "{% for c in m['tool_calls'] %}{% set f = c['function'] %}"
    "{{ 'call ' + f['name'] + '\n' + f['arguments'] + '\n' }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Templates that write every turn of a plain chat, whatever their other ways.
PLAIN = {
    "qwen3": QWEN3,
    "phi3": PHI3,
    "phi3 with another end": PHI3_OTHER_END,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}

# Tags around what is learned, two of them in a turn with thoughts.
TAGGED_TWICE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% if m['thinking'] %}{% generation %}({{ m['thinking'] }}){% endgeneration %}--\n{% endif %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)

# A template that asks for a variable, in the way of Qwen3.
THINKS = "{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}"
# Texts whose first characters a line before them could swallow, and whose names are read in other scopes.
THINKS_ANYWHERE = [
    THINKS,
    "\n  " + THINKS + "\n",
    "  {% if x %}{% endif %}\n" + THINKS,
    "{%- macro m() %}" + THINKS + "{% endmacro %}\n{% for m_ in messages %}{{ m() }}{% endfor %} \n\n",
    "{% generation %}" + THINKS + "{% endgeneration %}",
    QWEN3 + THINKS,
]
