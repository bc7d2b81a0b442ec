"""Chat templates of the zoo: small and clean, each a family's layout without the family's quirks."""

from __future__ import annotations

CHATML = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' -}}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

CHATML_BOS = "{{- bos_token -}}" + CHATML

CHATML_MARKED = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

# Hermes' way with tools, and reasoning that stays in every turn.
CHATML_TOOLS = r"""
{%- set talk = messages -%}
{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0]['role'] == 'system' -%}
        {{- messages[0]['content'] + '\n\n' -}}
        {%- set talk = messages[1:] -%}
    {%- endif -%}
    {{- '# Tools\n<tools>' -}}
    {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\n</tools><|im_end|>\n' -}}
{%- endif -%}
{%- for message in talk -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['reasoning_content'] -%}
        {{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- message['content'] or '' -}}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] or call -%}
        {{- '\n<tool_call>\n{"name": "' + function['name'] + '", "arguments": ' -}}
        {%- if function['arguments'] is string -%}
            {{- function['arguments'] -}}
        {%- else -%}
            {{- function['arguments'] | tojson -}}
        {%- endif -%}
        {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""

LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

# Role tags are plain text: only eos_token has to be a token.
ZEPHYR = r"""
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\n' -}}
{%- endif -%}
"""

ZEPHYR_BOS = "{{- bos_token -}}" + ZEPHYR

# Mistral v7: every role has a block of its own, and there is no generation prompt.
MISTRAL = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- message['content'] + eos_token -}}
    {%- elif message['role'] == 'system' -%}
        {{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' -}}
    {%- else -%}
        {{- '[INST]' + message['content'] + '[/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

# Gemma's layout, with Gemma 3's way with system messages, but for the family's trimming and raising.
GEMMA = r"""
{{- bos_token -}}
{%- set fold = namespace(text='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set fold.text = message['content'] + '\n\n' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<start_of_turn>model\n' + message['content'] + '<end_of_turn>\n' -}}
    {%- else -%}
        {{- '<start_of_turn>user\n' + fold.text + message['content'] + '<end_of_turn>\n' -}}
        {%- set fold.text = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
"""

# Prompt and answer touch, as in rows of completions.
PLAIN = r"""
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- message['content'] + eos_token -}}
    {%- else -%}
        {{- message['content'] -}}
    {%- endif -%}
{%- endfor -%}
"""

# What a file looks like whose author did not mind white space: two spaces before each turn, an empty line after it.
INDENTED = r"""{% for message in messages %}
  {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}

{% endfor %}
{%- if add_generation_prompt %}
  {{ '<|im_start|>assistant\n' -}}
{% endif %}"""
