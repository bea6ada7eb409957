package shim

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestEndCheckpoints: the process that looks like a runc that checkpoints this
// container ends, with its child, and that of another container does not.
func TestEndCheckpoints(t *testing.T) {
	start := func(id string) *exec.Cmd {
		cmd := exec.Command("/bin/sh", "-c", "while :; do sleep 60; done", "checkpoint", id)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); cmd.Wait() })
		return cmd
	}
	mine, other := start("test-end-checkpoints"), start("test-end-checkpoints-2")
	children := func(c *exec.Cmd) string {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(c.Process.Pid) + "/task/" + strconv.Itoa(c.Process.Pid) + "/children")
		return strings.TrimSpace(string(b))
	}
	for end := time.Now().Add(10 * time.Second); children(mine) == "" || children(other) == ""; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no children")
		}
	}
	child := children(mine)
	endCheckpoints("test-end-checkpoints")
	if err := mine.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it ended with %v", err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile("/proc/" + child + "/stat")
		if err != nil || strings.Contains(string(b), ") Z ") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("its child lives: %s", b)
		}
	}
	if syscall.Kill(other.Process.Pid, 0) != nil || children(other) == "" {
		t.Error("that of another container ended too")
	}
}

// TestReleaseOfAnother: a pid that is not of the container any more is left
// alone, as is a container that was never started.
func TestReleaseOfAnother(t *testing.T) {
	dir := t.TempDir()
	bundle := filepath.Join(dir, "c1")
	if err := os.Mkdir(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(bundle)
	if err := release("c1"); err != nil {
		t.Error(err)
	}
	for _, pid := range []int{os.Getpid(), 1 << 30} { // the second is nobody's
		if err := os.WriteFile(filepath.Join(bundle, "init.pid"), []byte(strconv.Itoa(pid)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := release("c1"); err != nil {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
	if err := os.WriteFile(filepath.Join(bundle, "init.pid"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if release("c1") == nil {
		t.Error("a pid that is none was accepted")
	}
}
