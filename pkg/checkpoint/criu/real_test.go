package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/internal/testenv"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// dumpee is set, in the environment of the process that is dumped, to the
// directory in which it counts.
const dumpee = "STASIS_TEST_DUMPEE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(dumpee); dir != "" {
		beDumped(dir)
	}
	os.Exit(m.Run())
}

// beDumped counts into a file until it is killed, with an open file that has no
// name and a listening socket. It never returns.
func beDumped(dir string) {
	ok := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
	ghost, err := os.Create(filepath.Join(dir, "ghost"))
	ok(err)
	_, err = ghost.WriteString("state")
	ok(err)
	ok(os.Remove(ghost.Name()))
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false) // CRIU cannot dump such sockets
	_, err = lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	ok(err)
	counter, err := os.Create(filepath.Join(dir, "counter"))
	ok(err)
	for n := 1; ; n++ {
		_, err := counter.WriteAt(fmt.Appendf(nil, "%020d\n", n), 0) // CRIU refuses files of another size
		ok(err)
		time.Sleep(time.Millisecond)
	}
}

// startDumpee starts a process to be dumped and returns its pid and a function
// that reads its counter.
func startDumpee(t *testing.T) (int, func() int) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), dumpee+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	count := func() int {
		b, _ := os.ReadFile(filepath.Join(dir, "counter"))
		line, _, _ := strings.Cut(string(b), "\n")
		n, _ := strconv.Atoi(line)
		return n
	}
	waitBeyond(t, count, 0)
	return cmd.Process.Pid, count
}

// waitBeyond waits until the counter has passed n.
func waitBeyond(t *testing.T, count func() int, n int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); count() <= n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the counter stays at %d", n)
		}
	}
}

// dumpCommand is a dump that leaves the process running, as a shim's is.
func dumpCommand(t *testing.T, pid int, dir string) *exec.Cmd {
	t.Helper()
	config := filepath.Join(t.TempDir(), "criu.conf")
	write(t, config, []byte(Config(DumpOptions(checkpoint.TCPClose))))
	return exec.Command(Binary, "dump", "--config", config, "-t", strconv.Itoa(pid), "-D", dir, "-o", "dump.log", "-v4", "--leave-running")
}

func TestRealVersion(t *testing.T) {
	testenv.Need(t, testenv.CRIU)
	out, err := exec.Command(Binary, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	n, text, err := Version(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "Version: "+text+"\n") || n < 30000 {
		t.Errorf("version %d, %q; criu says %q", n, text, out)
	}
	f, err := Features(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	// The command asks the kernel the same question.
	for name, got := range map[string]bool{"mem_dirty_track": f.MemTrack, "uffd-noncoop": f.LazyPages, "pidfd_store": f.PidfdStore} {
		want := exec.Command(Binary, "check", "--feature", name).Run() == nil
		if got != want {
			t.Errorf("feature %s: %v, criu check says %v", name, got, want)
		}
	}
	h, err := HostFacts(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if h.Arch != runtime.GOARCH || h.CRIUVersion != text || h.KernelRelease == "" || len(h.BootID) != 36 || len(h.CPUFlags) == 0 || h.CgroupMode == "unknown" {
		t.Errorf("facts %+v", h)
	}
	if err := CheckHost(h, h); err != nil {
		t.Errorf("this machine does not fit itself: %v", err)
	}
}

// TestRealDump dumps a process, looks into the images and brings it back from
// a view of them.
func TestRealDump(t *testing.T) {
	testenv.Need(t, testenv.CRIU)
	pid, count := startDumpee(t)
	images := t.TempDir()
	if out, err := dumpCommand(t, pid, images).CombinedOutput(); err != nil {
		lines, lerr := LogErrors(filepath.Join(images, "dump.log"), 10)
		t.Fatalf("dump: %v\n%s\n%s\n%v", err, out, strings.Join(lines, "\n"), lerr)
	}
	waitBeyond(t, count, count()) // it goes on
	if lines, err := LogErrors(filepath.Join(images, "dump.log"), 10); err != nil || len(lines) != 0 {
		t.Errorf("log of a dump that succeeded: %q, %v", lines, err)
	}
	stats, err := ReadDumpStats(images)
	if err != nil || stats.Frozen <= 0 || stats.PagesWritten == 0 {
		t.Errorf("statistics %+v, %v", stats, err)
	}

	r, err := Inspect(images)
	if err != nil {
		t.Fatal(err)
	}
	p := r.Processes[0]
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Processes) != 1 || p.PID != uint32(pid) || p.Exe != exe || p.State != "alive" || len(p.Threads) < 2 || p.UID != 0 {
		t.Errorf("processes %+v", r.Processes)
	}
	if got, want := p.ResidentBytes, stats.PagesWritten*PageSize; got != want {
		t.Errorf("resident %d bytes, statistics say %d", got, want)
	}
	if got, want := uint64(r.MemoryBytes), (stats.PagesWritten+stats.ShmemWritten)*PageSize; got != want {
		t.Errorf("%d bytes of pages, statistics say %d", got, want)
	}
	var ghost *OpenFile
	for _, f := range p.Files {
		if strings.HasSuffix(f.Path, "/ghost") {
			ghost = &f
		}
	}
	if ghost == nil || !ghost.Unlinked || ghost.Offset != 5 {
		t.Errorf("file without a name: %+v", ghost)
	}
	if len(r.Sockets) == 0 || r.Sockets[0].Protocol != "tcp" || r.Sockets[0].State != "listen" || !strings.HasPrefix(r.Sockets[0].Local, "127.0.0.1:") {
		t.Errorf("sockets %+v", r.Sockets)
	}

	// Restore through links, from the counter's value at the dump.
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
		t.Fatal(err)
	}
	last := count()
	view := filepath.Join(t.TempDir(), "view")
	if err := LinkImages(images, view); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "criu.conf")
	write(t, config, []byte(Config(RestoreOptions(checkpoint.TCPClose, false))))
	work := t.TempDir()
	if out, err := exec.Command(Binary, "restore", "--config", config, "-D", view, "-W", work, "-o", "restore.log", "-v4", "-d").CombinedOutput(); err != nil {
		lines, _ := LogErrors(filepath.Join(work, "restore.log"), 10)
		t.Fatalf("restore: %v\n%s\n%s", err, out, strings.Join(lines, "\n"))
	}
	t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
	waitBeyond(t, count, last)
}

// TestRealKilledDump kills CRIU at many points of a dump. The process must never
// stay stopped or traced: most often it goes on, for the parasite code in it
// sees its socket close and undoes itself (CRIU
// compel/plugins/std/infect.c:parasite_daemon). But where CRIU was just making
// a thread execute a system call, the thread runs into a breakpoint that nobody
// handles any more, and the process dies: CRIU cannot be killed safely.
func TestRealKilledDump(t *testing.T) {
	testenv.Need(t, testenv.CRIU)
	pid, count := startDumpee(t)
	// How long a whole dump takes here.
	start := time.Now()
	if out, err := dumpCommand(t, pid, t.TempDir()).CombinedOutput(); err != nil {
		t.Fatalf("dump: %v\n%s", err, out)
	}
	whole := time.Since(start)
	killed, died := 0, 0
	for range 20 {
		dir := t.TempDir()
		cmd := dumpCommand(t, pid, dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(whole))))
		cmd.Process.Kill()
		if err := cmd.Wait(); err != nil {
			killed++
		}
		before := count()
		for end := time.Now().Add(10 * time.Second); count() == before; time.Sleep(time.Millisecond) {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil || bytes.Contains(status, []byte("State:\tZ")) {
				died++
				pid, count = startDumpee(t)
				break
			}
			if time.Now().After(end) {
				t.Fatalf("stuck after CRIU was killed at %q:\n%s", lastLine(filepath.Join(dir, "dump.log")), status)
			}
		}
		if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err != nil || !bytes.Contains(status, []byte("TracerPid:\t0\n")) {
			t.Errorf("still traced: %s, %v", status, err)
		}
	}
	t.Logf("CRIU was killed %d times, the process died of it %d times", killed, died)
	if killed == 0 || died > killed/2 {
		t.Errorf("of %d kills %d killed the process, too", killed, died)
	}
	if out, err := dumpCommand(t, pid, t.TempDir()).CombinedOutput(); err != nil {
		t.Errorf("dump after all: %v\n%s", err, out)
	}
}

func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return "no log"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
