"""homes.py - on the host: what a kernel that works in a home directory reads and leaves there."""

from __future__ import annotations

from pathlib import Path

from frame import Kind, between
from tools import SECRET

# Where a login, a shell, an editor or a tool looks, and runs or trusts what it finds.
STARTED = """
.bashrc .bash_profile .bash_login .bash_logout .bash_aliases .bash_completion .profile .zshrc
.zshenv .zprofile .zlogin .zlogout .kshrc .mkshrc .cshrc .tcshrc .login .logout .shrc .shinit
.config/fish/config.fish .config/nushell/config.nu .config/xonsh/rc.py .xonshrc .inputrc .editrc
.xprofile .xsession .xsessionrc .xinitrc .xserverrc .Xresources .Xmodmap .pam_environment
.environment .config/environment.d/a.conf .config/autostart/a.desktop
.config/systemd/user/a.service .local/share/systemd/user/a.service
.local/share/applications/a.desktop .config/mimeapps.list .local/share/dbus-1/services/a.service
.config/plasma-workspace/env/a.sh .kde/Autostart/a .config/i3/config .i3/config
.config/sway/config .xmonad/xmonad.hs .fluxbox/startup .vimrc .gvimrc .exrc .vim/plugin/a.vim
.vim/vimrc .config/nvim/init.lua .nvimrc .local/share/nvim/site/plugin/a.vim .emacs .emacs.el
.emacs.d/init.el .config/emacs/init.el .spacemacs .doom.d/init.el .nanorc .config/nano/nanorc
.config/micro/init.lua .config/helix/config.toml .config/Code/User/settings.json
.vscode/extensions/a/package.json .vscode-server/extensions/a/x.js .cursor/mcp.json
.config/zed/settings.json .config/sublime-text/Packages/a.py .atom/init.coffee .config/JetBrains/a
.ideavimrc .tmux.conf .tmux/a .config/tmux/tmux.conf .screenrc .byobu/.tmux.conf .lesskey
.lessfilter .mailcap .mailrc .muttrc .mutt/muttrc .forward .procmailrc .msmtprc .gitconfig
.config/git/config .config/git/hooks/pre-commit .hgrc .config/hg/hgrc .subversion/config .gdbinit
.config/gdb/gdbinit .lldbinit .pdbrc .pdbrc.py .pythonrc .pythonrc.py .python_history
.config/pip/pip.conf .pip/pip.conf .pydistutils.cfg .pypirc
.local/lib/python3.11/site-packages/usercustomize.py .local/lib/python3.11/site-packages/a.pth
.local/lib/python3.13/site-packages/usercustomize.py .ipython/profile_default/startup/a.py
.jupyter/jupyter_server_config.py .jupyter/custom/custom.js
.local/share/jupyter/kernels/a/kernel.json .local/share/jupyter/labextensions/a/package.json
.local/etc/jupyter/jupyter_config.json .condarc .config/conda/condarc .mambarc .Rprofile .Renviron
.config/R/a .R/Makevars .julia/config/startup.jl .octaverc .sbclrc .ghci .ghc/ghci.conf
.cabal/config .stack/config.yaml .ocamlinit .irbrc .pryrc .gemrc .bundle/config .npmrc .yarnrc
.yarnrc.yml .config/yarn/global/a .cargo/config.toml .cargo/bin/ls .cargo/env
.rustup/settings.toml .m2/settings.xml .gradle/init.gradle .ivy2/a .sbt/1.0/plugins/a.sbt .mavenrc
.antrc .ant/lib/a .composer/composer.json .cpan/CPAN/MyConfig.pm .perltidyrc .perlcriticrc .wgetrc
.curlrc .netrc .psqlrc .my.cnf .sqliterc .mongorc.js .ssh/rc .ssh/config .ssh/authorized_keys
.rhosts .k5login .terraformrc .terraform.d/plugins/a .ansible.cfg .kube/config .docker/config.json
.aws/config .direnvrc .config/direnv/direnvrc .envrc .asdfrc .asdf/shims/ls .pyenv/shims/ls
.rbenv/shims/ls .nvm/nvm.sh .sdkman/bin/sdkman-init.sh .deno/bin/ls .bun/bin/ls .volta/bin/ls
.conda/environments.txt .nix-profile/bin/ls .oh-my-zsh/oh-my-zsh.sh .local/bin/ls bin/ls .fzf.bash
.fzf.zsh .p10k.zsh .zsh/a .config/starship.toml .ackrc .lftprc .config/ranger/rc.conf
.config/mpv/scripts/a.lua .config/htop/htoprc .config/alacritty/alacritty.toml
.config/kitty/kitty.conf .wezterm.lua .config/ghostty/config .Xclients .vnc/xstartup
.config/dunst/dunstrc .keras/keras.json .keras/datasets/cifar-10-batches-py/data_batch_1
.keras/models/a.h5
""".split()  # fmt: skip

SECRETS = """
.ssh/id_ed25519 .ssh/known_hosts .gnupg/private-keys-v1.d/a .aws/credentials
.azure/accessTokens.json .config/gcloud/credentials.db .kube/config .docker/config.json .netrc
.pgpass .my.cnf .npmrc .pypirc .git-credentials .config/git/credentials .config/gh/hosts.yml
.config/hub .config/glab-cli/config.yml .config/rclone/rclone.conf .s3cfg .boto
.config/doctl/config.yaml .terraform.d/credentials.tfrc.json .vault-token .ansible/vault
.huggingface/token .cache/huggingface/token .config/wandb/settings .kaggle/kaggle.json .openai
.config/openai.token .anthropic/key .gem/credentials .m2/settings.xml .gradle/gradle.properties
.ivy2/.credentials .sbt/credentials .composer/auth.json .config/composer/auth.json
.nuget/NuGet.Config .config/pip/pip.conf .condarc .bash_history .zsh_history .python_history
.ipython/profile_default/history.sqlite .psql_history .mysql_history .node_repl_history .lesshst
.viminfo .mozilla/firefox/a/logins.json .config/google-chrome/Default/Cookies
.config/chromium/Default/Cookies .thunderbird/a/key4.db .password-store/a.gpg
.local/share/keyrings/login.keyring .config/Bitwarden/data.json .keepass/a.kdbx .Xauthority
.ICEauthority .local/share/jupyter/runtime/jpserver-1.json .jupyter/jupyter_server_config.json
.config/dconf/user .local/share/fish/fish_history .purple/accounts.xml .irssi/config .fetchmailrc
.oci/config .databrickscfg .snowflake/config.toml .config/op/config .step/secrets/a
.minikube/ca.key .cargo/credentials .cargo/credentials.toml .npm/_logs/a.log
.nvm/versions/node/v20.1.0/etc/npmrc .volta/tools/image/node/20.1.0/etc/npmrc
.sdkman/candidates/maven/3.9.6/conf/settings.xml .asdf/installs/maven/3.9.6/conf/settings.xml
.asdf/installs/nodejs/20.1.0/etc/npmrc .asdf/installs/python/3.12.1/pip.conf
.opam/plugins/opam-publish/me.token .pyenv/versions/3.12.1/pip.conf .conda/.condarc
.conda/condarc.d/a.yml .conda/envs/own/.condarc .conda/envs/own/conda-meta/state
.conda/envs/own/etc/conda/env_vars.d/a.json .conda/envs/own/etc/conda/activate.d/a.sh
.venv/pip.conf .venv/etc/jupyter/jupyter_server_config.json .virtualenvs/own/pip.conf
.virtualenvs/postactivate .virtualenvs/own/bin/postactivate .oh-my-zsh/custom/tokens.zsh
""".split()  # fmt: skip

PLANT = """
import os
for name in {names!r}:
    try:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "w") as file:
            file.write("planted")
    except OSError:
        pass
"""
FIND = """
found = []
for name in {names!r}:
    try:
        with open(name, errors="replace") as file:
            found += [name] if file.read() == {secret!r} else []
    except OSError:
        pass
print(*found)
"""


def home_of(stage, names=()):
    """The work directory, as the server's home; *names* are there."""
    home = stage.workdir
    stage.patch.setenv("HOME", str(home))
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(SECRET)
    return home


def planted(home):
    """What of it can be seen from outside, when the kernel has ended."""
    found = [name for name in STARTED if _text(home / name) == "planted"]
    return " ".join(found) or "nothing"


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def plant_plainly(stage, there):
    home = home_of(stage, STARTED if there else ())
    stage.patch.chdir(home)
    exec(PLANT.format(names=STARTED))
    return "all" if planted(home) == " ".join(STARTED) else "not all"


for number, title, there in (
    (400, f"plant {len(STARTED)} start-up files and programs in a home without any", False),
    (401, "overwrite them where they are there", True),
):

    @between(
        number, title, Kind.HOMES, "what a login, a shell or a tool runs", there,
        expect="nothing", landlock="refused", without=plant_plainly, control="all",
    )  # fmt: skip
    def plant_in_home(stage, there):
        home = home_of(stage, STARTED if there else ())
        said = stage.tries(home, PLANT.format(names=STARTED))
        return said or planted(home)


def read_plainly(stage):
    home = home_of(stage, SECRETS)
    return "all" if all(_text(home / name) == SECRET for name in SECRETS) else "not all"


@between(
    402, f"read {len(SECRETS)} places of secrets in a home", Kind.HOMES, "keys, tokens, histories",
    expect="nothing", landlock="refused", without=read_plainly, control="all",
)  # fmt: skip
def read_secrets(stage):
    home = home_of(stage, SECRETS)
    return stage.tries(home, FIND.format(names=SECRETS, secret=SECRET)) or "nothing"


RENAME = """
import os
for name in (".ssh", ".config", ".local", ".local/share", ".bashrc", ".cargo"):
    for target in ("moved", "moved/below"):
        try:
            os.rename(name, target)
        except OSError:
            pass
for name in ("moved/id_ed25519", "moved/.credentials", "moved"):
    try:
        print(open(name).read())
    except OSError:
        pass
"""


def rename_plainly(stage):
    home = home_of(stage, SECRETS)
    (home / ".ssh").rename(home / "moved")
    return _text(home / "moved/id_ed25519")


@between(
    403, "move a covered directory away, and read it there", Kind.HOMES, "a cover is a mount",
    expect="nothing", landlock="refused", without=rename_plainly, control=SECRET,
)  # fmt: skip
def rename_covered(stage):
    home = home_of(stage, [*SECRETS, ".bashrc"])
    return stage.tries(home, RENAME) or "nothing"


@between(
    405, "write to a link of one's dotfiles", Kind.HOMES, "dotfiles that are links",
    expect=SECRET, landlock="refused", without=lambda stage: "planted", control="planted",
)  # fmt: skip
def write_linked(stage):
    home = home_of(stage, ["dotfiles/bashrc"])
    (home / ".bashrc").symlink_to("dotfiles/bashrc")
    said = stage.tries(home, PLANT.format(names=["dotfiles/bashrc", ".bashrc"]))
    return said or Path(home / "dotfiles/bashrc").read_text()


LOGIN = """
. ~/tools/env.sh
export PATH="$HOME/tools/bin:$HOME/more/bin:$PATH"
"""
OF_LOGIN = ["tools/env.sh", "tools/bin/ls", "more/bin/ls"]
OVERWRITE = f"""
import os
for name in {OF_LOGIN}:
    try:
        os.path.exists("tools") and os.rename("tools", "moved")
    except OSError:
        pass
    try:
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w") as file:
            file.write("planted")
    except OSError:
        pass
"""


def home_with_login(stage):
    home = home_of(stage, OF_LOGIN[:2])
    (home / ".profile").write_text(LOGIN)
    return home


def written_of(home):
    found = [name for name in OF_LOGIN if _text(home / name) == "planted"]
    return " ".join(found) or "nothing"


def overwrite_plainly(stage):
    stage.patch.chdir(home_with_login(stage))
    exec(OVERWRITE)
    return "all" if written_of(stage.workdir) == " ".join(OF_LOGIN) else "not all"


@between(
    404, "change what a login sources and searches, and make what it would find", Kind.HOMES,
    "names with no dot in front, which .profile names",
    expect="nothing", landlock="refused", without=overwrite_plainly, control="all",
)  # fmt: skip
def overwrite_of_login(stage):
    home = home_with_login(stage)
    return stage.tries(home, OVERWRITE) or written_of(home)
