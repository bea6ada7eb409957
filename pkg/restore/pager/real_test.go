package pager

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
)

// template is a process that was dumped, to be restored again and again.
type template struct {
	images    string
	pid       int
	addresses []string // of its processes
}

// dump dumps processes with so many bytes of patterned memory each.
func dump(t testing.TB, bytes, processes int) *template {
	t.Helper()
	testenv.Need(t, testenv.CRIU)
	tm := &template{images: t.TempDir()}
	file := filepath.Join(t.TempDir(), "address")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %s", dumpee, bytes, processes, file))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tm.pid = cmd.Process.Pid
	t.Cleanup(func() { tm.kill(t) })
	for range processes {
		var b []byte
		for end := time.Now().Add(30 * time.Second); len(b) == 0; time.Sleep(time.Millisecond) {
			b, _ = os.ReadFile(file)
			if time.Now().After(end) {
				t.Fatal("the program does not listen")
			}
		}
		tm.addresses = append(tm.addresses, string(b))
		file += ".child"
	}
	config := filepath.Join(t.TempDir(), "criu.conf")
	if err := os.WriteFile(config, []byte(criu.Config(criu.DumpOptions(checkpoint.TCPClose))), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, tm.images, exec.Command(criu.Binary, "dump", "--config", config, "-t", strconv.Itoa(tm.pid), "-D", tm.images, "-o", "criu.log", "-v4"))
	cmd.Wait()
	return tm
}

// run runs CRIU and shows its log if it fails.
func run(t testing.TB, dir string, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s\n%s", cmd.Args, err, out, logOf(dir))
	}
}

func logOf(dir string) string {
	lines, err := criu.LogErrors(filepath.Join(dir, "criu.log"), 20)
	return fmt.Sprint(strings.Join(lines, "\n"), err)
}

// kill ends the whole tree; it is a session.
func (tm *template) kill(t testing.TB) {
	unix.Kill(-tm.pid, unix.SIGKILL)
	for end := time.Now().Add(10 * time.Second); unix.Kill(-tm.pid, 0) == nil; time.Sleep(time.Millisecond) {
		for { // what CRIU has left to this process, if it is a subreaper
			if pid, err := unix.Wait4(-tm.pid, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
		if time.Now().After(end) {
			t.Error("the restored process does not die")
			return
		}
	}
}

// criuRestore is the command of a restore, lazy or not.
func (tm *template) criuRestore(t testing.TB, work string, lazy bool) *exec.Cmd {
	t.Helper()
	config := filepath.Join(work, "criu.conf")
	if err := os.WriteFile(config, []byte(criu.Config(criu.RestoreOptions(checkpoint.TCPClose, lazy))), 0o600); err != nil {
		t.Fatal(err)
	}
	return exec.Command(criu.Binary, "restore", "--config", config, "-D", tm.images, "-W", work, "-o", "criu.log", "-v4", "-d")
}

// restore restores through a pager.
func (tm *template) restore(t testing.TB, opt Options) *Pager {
	t.Helper()
	opt.ImageDir, opt.WorkDir = tm.images, t.TempDir()
	p, err := Start(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		tm.kill(t)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	run(t, opt.WorkDir, tm.criuRestore(t, opt.WorkDir, true))
	return p
}

func waitFull(t testing.TB, p *Pager) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Fatalf("%v; %+v", err, p.Stats())
	}
}

// TestRealRestore restores through the pager and looks at every byte.
func TestRealRestore(t *testing.T) {
	tm := dump(t, 128<<20, 2)
	p := tm.restore(t, Options{})
	waitFull(t, p)
	s := p.Stats()
	t.Logf("%+v, %.1f GB/s", s, s.Rate()/1e9)
	if s.TotalBytes < 256<<20 || s.CopiedBytes < s.TotalBytes || s.Processes != 2 || s.Filled == 0 {
		t.Errorf("%+v", s)
	}
	for _, a := range tm.addresses {
		if err := ask(t, a, "verify"); err != nil {
			t.Error(err)
		}
	}
	if left, err := filepath.Glob(filepath.Join(p.opt.WorkDir, "*.socket")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
