package shim

import (
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stasis-containers/stasis/internal/testenv"
)

// TestHostnameEndsNoThread: processes that ask to be killed with the thread that
// started them, as each runc does, outlive questions for a host name.
func TestHostnameEndsNoThread(t *testing.T) {
	testenv.Need(t, testenv.Root)
	want, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	var sleeps []*exec.Cmd
	for range 200 {
		cmd := exec.Command("sleep", "60")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		started := make(chan error, 1)
		go func() { started <- cmd.Start() }()
		if err := <-started; err != nil {
			t.Fatal(err)
		}
		sleeps = append(sleeps, cmd)
		name, err := hostnameIn("/proc/self/ns/uts")
		if err != nil || name != want {
			t.Fatalf("%q, %v, want %q", name, err, want)
		}
	}
	killed := 0
	for _, cmd := range sleeps {
		if cmd.Process.Signal(syscall.SIGTERM) != nil {
			killed++
		}
		if err := cmd.Wait(); err == nil || err.Error() != "signal: terminated" {
			killed++
		}
	}
	if killed > 0 {
		t.Errorf("%d of %d were killed", killed, len(sleeps))
	}
}
