# What TAB offers after `allranks` in bash. In ~/.bashrc:  eval "$(allranks completion bash)"
_allranks() {
    local line=${COMP_LINE:0:COMP_POINT} plain word head each open=no
    mapfile -t COMPREPLY < <("$1" completion --line "$line" 2>/dev/null)
    # Within a quote that is still open, bash takes the rest of the word as it is.
    if [[ ${COMP_WORDS[COMP_CWORD]:-} == [\"\']* ]]; then open=yes; fi
    # Elsewhere it cuts words at `=` and `:`, and wants only what follows the last cut, quoted.
    if [[ $open == no ]]; then
        plain=${line//\\[[:space:]]/__}
        word=${plain##*[[:space:]]}
        head=${word%"${word##*[=:]}"}
        COMPREPLY=("${COMPREPLY[@]#"$head"}")
        for each in "${!COMPREPLY[@]}"; do
            if [[ ${COMPREPLY[each]} == *[[:space:]\"\'\\\&\;\(\)\|\<\>\$\`\!]* ]]; then
                printf -v word %q "${COMPREPLY[each]}"
                COMPREPLY[each]=${word/#\\~/\~}
            fi
        done
    fi
    # No space after `model=`, `trainer.` or a folder: the word goes on.
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.] ]]; then compopt -o nospace; fi
}
complete -o default -o nosort -F _allranks allranks
