@echo off
rem Starts glmui: makes .venv the first time, then runs app.py with every argument passed on.
rem   launch.bat [ARGUMENTS]        as `python app.py ARGUMENTS`: doctor, chat, --port 8000 ...
rem   launch.bat test [ARGUMENTS]   the tests
rem What it shares with launch.sh is in launch.py. docs\launching.md tells the whole way.
setlocal EnableExtensions DisableDelayedExpansion

set "here=%~dp0"
set "venv_python=%here%.venv\Scripts\python.exe"
set "extra="
if "%~1"=="test" set "extra=dev"

rem A proxy set by variables must not come between the browser and this machine. Where none is set, Windows' own
rem settings hold, which have exceptions of their own, and a NO_PROXY alone would make Python ignore them.
if not defined HTTP_PROXY if not defined HTTPS_PROXY if not defined ALL_PROXY if not defined NO_PROXY goto environment
set "local_hosts=localhost,127.0.0.1,::1"
if not defined NO_PROXY set "NO_PROXY=%local_hosts%" & goto environment
if not "%NO_PROXY%"=="*" set "NO_PROXY=%NO_PROXY%,%local_hosts%"

rem This file keeps to the plainest commands, so that it can be tested under Wine.
:environment
if not exist "%venv_python%" goto install
"%venv_python%" -I -X utf8 "%here%launch.py" check %extra% >nul 2>nul
if %errorlevel%==0 goto start

:install
set "found="
for %%p in ("py -3.11" "py -3.12" "py -3.13" "python" "python3") do if not defined found call :try %%~p
if not defined found goto no_python
call %found% -I -X utf8 "%here%launch.py" install %extra% 1>&2
if not %errorlevel%==0 goto failed

:start
if defined extra goto test
"%venv_python%" "%here%app.py" %*
if not %errorlevel%==0 goto failed
exit /b 0

:test
set "rest="
for /f "tokens=1*" %%a in ("%*") do set "rest=%%b"
cd /d "%here%"
"%venv_python%" -m pytest %rest%
if not %errorlevel%==0 goto failed
exit /b 0

rem Every candidate is run: a version manager's shim (or the Store's) may exist and fail. `call`: it may be a .bat.
:try
call %* -I -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.maxsize < 2**32)" >nul 2>nul
if %errorlevel%==0 set "found=%*"
exit /b 0

rem A double click opens a window for this file alone: keep it until its words are read.
:failed
set "code=%errorlevel%"
if defined CI exit /b %code%
setlocal EnableDelayedExpansion
if not "!cmdcmdline:%~nx0=!"=="!cmdcmdline!" pause
exit /b %code%

:no_python
chcp 65001 >nul
set "locale=%GLMUI_LANGUAGE%"
if not defined locale for /f "tokens=3" %%l in ('reg query "HKCU\Control Panel\International" /v LocaleName 2^>nul') do set "locale=%%l"
if /i "%locale:~0,2%"=="zh" goto no_python_zh
echo No 64-bit Python 3.11, 3.12 or 3.13 was found. Install one (winget install Python.Python.3.11, or https://www.python.org/downloads/), then start glmui again. 1>&2
cmd /c exit 1
goto failed
:no_python_zh
echo 没有找到 64 位的 Python 3.11、3.12 或 3.13。请先安装其中一个（winget install Python.Python.3.11，或 https://www.python.org/downloads/），再启动 glmui。 1>&2
cmd /c exit 1
goto failed
