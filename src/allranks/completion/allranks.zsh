# What TAB offers after `allranks` in zsh. In ~/.zshrc, after compinit:  eval "$(allranks completion zsh)"
_allranks() {
    local -a found open closed
    found=("${(@f)$(allranks completion --line "$LBUFFER" 2>/dev/null)}")
    found=(${found:#})
    if (( $#found == 0 )); then
        _files
        return
    fi
    # No space after `model=`, `trainer.` or a folder: the word goes on.
    open=(${(M)found:#*[=/.]})
    closed=(${found:#*[=/.]})
    (( $#open )) && compadd -V open -S '' -- $open
    (( $#closed )) && compadd -V closed -- $closed
}
compdef _allranks allranks
