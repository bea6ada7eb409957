package pager

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
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

// TestRealHot: what tasks wait for is told, and filled first the next time, however
// much of what is to be filled first is nonsense.
func TestRealHot(t *testing.T) {
	tm := dump(t, 64<<20, 1)
	mem, err := criu.OpenLazyMemory(tm.images)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	task := mem.Tasks[0]
	within := func(r Range) bool {
		return r.PID == task.PID && r.Addr%HotSize == 0 && slices.ContainsFunc(task.Runs, func(run criu.LazyRun) bool {
			return run.Addr < r.Addr+HotSize && run.Addr+run.Size > r.Addr
		})
	}

	p := tm.restore(t, Options{pause: 2 * time.Millisecond})
	if err := ask(t, tm.addresses[0], "verify"); err != nil {
		t.Error(err)
	}
	waitFull(t, p)
	touched := p.Touched()
	t.Logf("%d ranges, %+v", len(touched), p.Stats())
	if len(touched) == 0 || uint64(len(touched)) > p.Stats().Faults || p.Stats().HotRanges != 0 {
		t.Errorf("%d ranges, %+v", len(touched), p.Stats())
	}
	for i, r := range touched {
		if !within(r) || slices.Contains(touched[:i], r) {
			t.Errorf("range %d, %+v", i, r)
		}
	}
	tm.kill(t)

	// The end of the large memory first, which comes late by address.
	end := uint64(0)
	for _, r := range task.Runs {
		if r.Size >= 1<<20 {
			end = (r.Addr + r.Size) &^ (HotSize - 1)
		}
	}
	var hot []Range
	for i := range uint64(8) {
		hot = append(hot, Range{task.PID, end - (8-i)*HotSize})
	}
	nonsense := []Range{{task.PID + 1, hot[0].Addr}, {task.PID, 1 << 62}, {task.PID, hot[0].Addr + pageSize}, {}, hot[0]}
	p = tm.restore(t, Options{pause: 20 * time.Millisecond, Threads: 1, Hot: append(nonsense, hot...)})
	deadline := time.Now().Add(20 * time.Second)
	for _, r := range hot {
		for !present(t, tm.pid, r.Addr) {
			if time.Now().After(deadline) {
				t.Fatalf("%#x is not there", r.Addr)
			}
			time.Sleep(time.Millisecond)
		}
	}
	s := p.Stats()
	if s.CopiedBytes > s.TotalBytes/4 || s.HotRanges != len(hot) {
		t.Errorf("%+v when all of %d hot ranges are there", s, len(hot))
	}
	waitFull(t, p)
	if err := ask(t, tm.addresses[0], "verify"); err != nil {
		t.Error(err)
	}
}

// present tells whether a process has a page at an address.
func present(t *testing.T, pid int, addr uint64) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], int64(addr/pageSize*8)); err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(b[:])>>63 == 1
}

// TestRealStress changes memory in all ways while it is being filled.
func TestRealStress(t *testing.T) {
	tm := dump(t, 64<<20, 1)
	for i, command := range slices.Repeat([]string{"verify", "remove", "unmap", "remap", "drop", "protect", "fork"}, 2) {
		name, opt := command, Options{pause: 4 * time.Millisecond, Threads: 2} // half a second in all
		if i >= 7 {
			name, opt = command+", one thread for all", Options{pause: time.Millisecond, Threads: -1}
		}
		t.Run(name, func(t *testing.T) {
			p := tm.restore(t, opt)
			if err := ask(t, tm.addresses[0], command); err != nil {
				t.Errorf("%v; %+v", err, p.Stats())
			}
			s := p.Stats()
			waitFull(t, p)
			t.Logf("%+v", p.Stats())
			if command == "remove" { // nothing came back
				if err := ask(t, tm.addresses[0], "removed"); err != nil {
					t.Error(err)
				}
			}
			if s.Faults < 64 {
				t.Errorf("%d faults: nothing was missing any more", s.Faults)
			}
			least := uint64(4)
			switch command {
			case "verify", "protect":
				least = 0
			case "fork":
				least = 1 // after the first all may be there before the next
			}
			if s.Events < least || least == 0 && s.Events > 3 {
				t.Errorf("%d events", s.Events)
			}
		})
	}
}

// hang asks for all memory, which must not come: neither right nor wrong. It
// returns when the process has been killed.
func hang(t *testing.T, tm *template) {
	t.Helper()
	answer := make(chan error, 1)
	go func() { answer <- ask(t, tm.addresses[0], "verify") }()
	select {
	case err := <-answer:
		t.Errorf("answer from a process without its memory: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	tm.kill(t)
	if err := <-answer; err == nil || strings.Contains(err.Error(), "page at") {
		t.Errorf("answer: %v", err)
	}
}

// TestRealLost loses the images in the middle: nobody reads zeroes instead, and
// the owner is told at once.
func TestRealLost(t *testing.T) {
	tm := dump(t, 64<<20, 1)
	p := tm.restore(t, Options{pause: 20 * time.Millisecond})
	pages, err := filepath.Glob(filepath.Join(tm.images, "pages-*.img"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("%v, %v", pages, err)
	}
	for _, name := range pages {
		if err := os.Truncate(name, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := p.Wait(ctx); err == nil || errors.Is(err, ErrNotRestored) || ctx.Err() != nil {
		t.Errorf("wait: %v", err)
	}
	hang(t, tm)
}

// TestRealCancelled ends the context in the middle.
func TestRealCancelled(t *testing.T) {
	tm := dump(t, 64<<20, 1)
	ctx, cancel := context.WithCancelCause(t.Context())
	work := t.TempDir()
	p, err := Start(ctx, Options{ImageDir: tm.images, WorkDir: work, pause: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	run(t, work, tm.criuRestore(t, work, true))
	why := errors.New("enough")
	cancel(why)
	if err := p.Wait(t.Context()); !errors.Is(err, why) || errors.Is(err, ErrNotRestored) {
		t.Errorf("wait: %v", err)
	}
	hang(t, tm)
}

// TestRealAbandoned fails before CRIU has finished: then CRIU fails, too, and
// leaves no process.
func TestRealAbandoned(t *testing.T) {
	tm := dump(t, 16<<20, 2)
	ours, theirs := socketPair(t)
	work := t.TempDir()
	p, err := Start(t.Context(), Options{ImageDir: tm.images, WorkDir: work, Keeper: NewKeeper(ours)})
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close() // from now on nothing can be held
	defer p.Close()
	start := time.Now()
	if err := tm.criuRestore(t, work, true).Run(); err == nil {
		t.Error("CRIU restored without a pager")
	}
	if err := p.Wait(t.Context()); !errors.Is(err, ErrNotRestored) || !errors.Is(err, unix.EPIPE) {
		t.Errorf("wait: %v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
	for end := time.Now().Add(5 * time.Second); unix.Kill(-tm.pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a process is left")
		}
	}
}

func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		conns[i] = connOf(t, fd)
	}
	return conns[0], conns[1]
}

func connOf(t testing.TB, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// TestRealKilled kills the pager's process in the middle, while another process
// holds the descriptors; and lets it finish.
func TestRealKilled(t *testing.T) {
	tm := dump(t, 64<<20, 2)
	for _, kill := range []bool{true, false} {
		t.Run(fmt.Sprint(kill), func(t *testing.T) {
			work := t.TempDir()
			r := tm.separate(t, work, 4*time.Millisecond)
			t.Cleanup(func() { tm.kill(t) })
			run(t, work, tm.criuRestore(t, work, true))
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if !kill {
				var asking sync.WaitGroup
				for _, a := range tm.addresses { // at once: both have much that is missing
					asking.Go(func() {
						if err := ask(t, a, "fork"); err != nil {
							t.Error(err)
						}
					})
				}
				asking.Wait()
				// Each has a child at least whose memory was to be filled, too; when the
				// later ones come all of it may be there.
				if s := r.wait(t); s.Processes < 4 || s.Events < 2 {
					t.Errorf("%+v", s)
				}
				return
			}
			if err := r.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := r.held.Wait(ctx); !errors.Is(err, ErrLost) {
				t.Errorf("wait: %v", err)
			}
			hang(t, tm)
		})
	}
}

// TestRealKilledBefore kills a pager that has read nothing of what CRIU has sent:
// the descriptors are in the queue of a socket that the other process holds. If
// CRIU has finished by then nobody reads zeroes, and otherwise CRIU fails.
func TestRealKilledBefore(t *testing.T) {
	tm := dump(t, 64<<20, 2)
	work := t.TempDir()
	r := tm.separate(t, work, 0)
	t.Cleanup(func() { tm.kill(t) })
	if err := r.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	cmd := tm.criuRestore(t, work, true)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	finished := false
	select {
	case err := <-done:
		if finished = err == nil; !finished {
			t.Fatalf("CRIU: %v\n%s", err, logOf(work))
		}
	case <-time.After(10 * time.Second): // a task may wait for a page before
	}
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := r.held.Wait(ctx); !errors.Is(err, ErrLost) {
		t.Errorf("wait: %v", err)
	}
	t.Logf("CRIU has finished: %v", finished)
	if finished {
		hang(t, tm)
		return
	}
	// Where a task waits for a page, CRIU waits for the task: whoever holds the
	// descriptors kills it.
	unix.Kill(-tm.pid, unix.SIGKILL)
	select {
	case err := <-done:
		if err == nil {
			t.Error("CRIU has finished without a pager")
		}
	case <-time.After(30 * time.Second):
		t.Error("CRIU does not give up")
	}
}

// remote is a pager in a process of its own, whose descriptors are held here.
type remote struct {
	cmd  *exec.Cmd
	out  *bufio.Reader
	held *Held
}

// separate starts a pager in a process of its own.
func (tm *template) separate(t testing.TB, work string, pause time.Duration) *remote {
	t.Helper()
	ours, theirs := socketPair(t)
	f, err := theirs.File()
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	defer f.Close()
	r := &remote{cmd: exec.Command(os.Args[0])}
	r.cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s %s", separate, pause, tm.images, work))
	r.cmd.ExtraFiles = []*os.File{f}
	r.cmd.Stderr = os.Stderr
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.held = Hold(ours)
	t.Cleanup(func() {
		r.cmd.Process.Kill()
		r.cmd.Wait()
		tm.kill(t)
		if err := r.held.Close(); err != nil {
			t.Error(err)
		}
	})
	if line, err := r.out.ReadString('\n'); err != nil || line != "listening\n" {
		t.Fatalf("pager: %q, %v", line, err)
	}
	return r
}

// wait waits until all memory is full.
func (r *remote) wait(t testing.TB) (s Stats) {
	t.Helper()
	if err := json.NewDecoder(r.out).Decode(&s); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := errors.Join(r.held.Wait(ctx), r.cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	return s
}

// separate is set, in the environment of a process that is to be a pager with
// a keeper at descriptor 3, to its pause and directories.
const separate = "STASIS_TEST_SEPARATE_PAGER"

func beSeparate(v string) error {
	f := os.NewFile(3, "keeper")
	c, err := net.FileConn(f)
	if err != nil {
		return err
	}
	f.Close()
	pause, dirs, _ := strings.Cut(v, " ")
	images, work, _ := strings.Cut(dirs, " ")
	d, err := strconv.Atoi(pause)
	if err != nil {
		return err
	}
	p, err := Start(context.Background(), Options{ImageDir: images, WorkDir: work, Keeper: NewKeeper(c.(*net.UnixConn)), pause: time.Duration(d)})
	if err != nil {
		return err
	}
	fmt.Println("listening")
	err = p.Wait(context.Background())
	return errors.Join(err, json.NewEncoder(os.Stdout).Encode(p.Stats()), p.Close(), c.Close())
}

// TestRealRunc restores a container. runc has CRIU read a configuration file
// after its request, and the option for lazy pages comes from there: it is
// empty at the dump, where the option would mean something else.
func TestRealRunc(t *testing.T) {
	testenv.Need(t, testenv.CRIU, testenv.Runc)
	bundle, out := t.TempDir(), t.TempDir()
	root, images, work := filepath.Join(bundle, "rootfs"), filepath.Join(bundle, "images"), filepath.Join(bundle, "work")
	config := filepath.Join(bundle, "criu.conf")
	for _, dir := range []string{root, images, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "program"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	runc := func(args ...string) {
		t.Helper()
		log := filepath.Join(out, args[0]+".log")
		cmd := exec.Command("runc", append([]string{"--log", log}, args...)...)
		cmd.Dir = bundle
		if err := cmd.Run(); err != nil { // the container has runc's output
			b, _ := os.ReadFile(log)
			t.Fatalf("%v: %v\n%s\n%s", cmd.Args, err, b, logOf(work))
		}
	}
	runc("spec")
	editSpec(t, filepath.Join(bundle, "config.json"), func(s *specs.Spec) {
		s.Process.Args = []string{"/program"}
		s.Process.Env = []string{fmt.Sprintf("%s=%d 1 /out/address", dumpee, 64<<20)}
		s.Process.Terminal = false
		s.Root.Readonly = false
		s.Annotations = map[string]string{"org.criu.config": config}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/out", Type: "bind", Source: out, Options: []string{"bind"}})
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
	})
	writeConfig := func(o criu.ConfigOptions) {
		t.Helper()
		if err := os.WriteFile(config, []byte(criu.Config(o)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id := fmt.Sprintf("pager-%d", os.Getpid())
	t.Cleanup(func() { exec.Command("runc", "delete", "--force", id).Run() })
	runc("run", "--detach", id)
	var address []byte
	for end := time.Now().Add(30 * time.Second); len(address) == 0; time.Sleep(time.Millisecond) {
		address, _ = os.ReadFile(filepath.Join(out, "address"))
		if time.Now().After(end) {
			t.Fatal("the program does not listen")
		}
	}
	writeConfig(criu.DumpOptions(checkpoint.TCPClose))
	runc("checkpoint", "--image-path", images, "--work-path", work, id)

	writeConfig(criu.RestoreOptions(checkpoint.TCPClose, true))
	p, err := Start(t.Context(), Options{ImageDir: images, WorkDir: work})
	if err != nil {
		t.Fatal(err)
	}
	runc("restore", "--detach", "--image-path", images, "--work-path", work, id)
	err = ask(t, string(address), "verify")
	waitFull(t, p)
	s := p.Stats()
	t.Logf("%+v", s)
	if cerr := p.Close(); err != nil || cerr != nil || s.CopiedBytes < 64<<20 {
		t.Errorf("%v, %v, %+v", err, cerr, s)
	}
}

func editSpec(t *testing.T, name string, f func(*specs.Spec)) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	s := new(specs.Spec)
	if err := json.Unmarshal(b, s); err != nil {
		t.Fatal(err)
	}
	f(s)
	if b, err = json.Marshal(s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
