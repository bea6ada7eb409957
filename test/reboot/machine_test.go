package reboot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// defaultCPU has what a node of today has; QEMU's "max" changes with QEMU.
const defaultCPU = "Skylake-Client-v3"

// machine is a virtual machine with a disk of its own. One processor: with two,
// kernel 6.12 panics under QEMU 7.2, see test/vm/run.
type machine struct {
	t      *testing.T
	vm     string // what test/vm/prepare made
	dir    string
	seed   string // archive that the first boot puts on the disk
	qemu   *exec.Cmd
	done   chan struct{} // closed when QEMU has ended
	boots  int
	keep   bool // the directory outlives the test
	port   int  // of this machine, forwarded to the agent
	client *http.Client
	booted time.Time // when the power came on
}

// newMachine makes the disk. Nothing is left of it when the test has passed,
// unless STASIS_KEEP is set; of a failed one the consoles are kept in out/reboot.
func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, vm: filepath.Join(env("STASIS_CACHE", "/var/cache/stasis"), "vm")}
	var err error
	if m.dir, err = os.MkdirTemp(env("STASIS_SCRATCH", "/var/tmp"), "stasis-reboot."); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.cut()
		if os.Getenv("STASIS_KEEP") != "" {
			t.Logf("kept: %s", m.dir)
			return
		}
		m.keepConsoles()
		if m.keep {
			return
		}
		os.RemoveAll(m.dir)
	})
	m.seed = filepath.Join(m.dir, "seed.tar")
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", filepath.Join(m.vm, "root.img"), m.disk()).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
	m.client = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			if address == "agent:80" {
				return new(net.Dialer).DialContext(ctx, "tcp", m.agent())
			}
			return m.dial(ctx, address)
		},
	}}
	return m
}

func (m *machine) disk() string  { return filepath.Join(m.dir, "disk.qcow2") }
func (m *machine) agent() string { return "127.0.0.1:" + strconv.Itoa(m.port) }
func (m *machine) console(boot int) string {
	return filepath.Join(m.dir, fmt.Sprintf("console-%d.log", boot))
}

func (m *machine) keepConsoles() {
	to := filepath.Join(env("STASIS_OUT", os.TempDir()), strings.ReplaceAll(m.t.Name(), "/", "-"))
	if err := os.MkdirAll(to, 0o755); err != nil {
		return
	}
	logs, _ := filepath.Glob(filepath.Join(m.dir, "*.log"))
	for _, name := range logs {
		if b, err := os.ReadFile(name); err == nil {
			os.WriteFile(filepath.Join(to, filepath.Base(name)), b, 0o644) //nolint:errcheck // best effort
		}
	}
}

// on turns the machine on with one of test/vm/prepare's kernels. A guest's
// flushes reach the disk's file, as cache=writeback has it: what a cut of the
// power loses is all that the guest had not written, and what QEMU keeps in
// memory of the disk's allocation between two flushes.
func (m *machine) on(kernel, cpu string) {
	m.t.Helper()
	m.start(kernel, cpu)
}

// snapshot is the name under which the disk keeps the machine's memory.
const snapshot = "ready"

// save keeps the running machine's state, memory included, in its disk, and
// turns it off.
func (m *machine) save() {
	m.t.Helper()
	c, err := net.Dial("unix", filepath.Join(m.dir, "monitor"))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Minute)) //nolint:errcheck // a socket has deadlines
	// The monitor does one command after the other, and ends with the second.
	fmt.Fprintf(c, "savevm %s\nquit\n", snapshot)
	said, _ := io.ReadAll(c)
	m.off(time.Minute)
	out, err := exec.Command("qemu-img", "snapshot", "-l", m.disk()).CombinedOutput()
	if err != nil || !strings.Contains(string(out), snapshot) {
		m.t.Fatalf("no snapshot: %v: %s\nmonitor: %s", err, out, said)
	}
}

// copyOf is another machine that stands where the saved one stood.
func copyOf(t *testing.T, saved *machine, kernel, cpu string) *machine {
	t.Helper()
	m := newMachine(t)
	m.seed = saved.seed // not read again, but a disk that the machine had
	out, err := exec.Command("cp", "--sparse=always", saved.disk(), m.disk()).CombinedOutput()
	if err != nil {
		t.Fatalf("copying the disk: %v: %s", err, out)
	}
	m.start(kernel, cpu, "-loadvm", snapshot)
	return m
}

func (m *machine) start(kernel, cpu string, more ...string) {
	m.t.Helper()
	m.port = freePort(m.t)
	m.boots++
	k := filepath.Join(m.vm, "kernel-"+kernel)
	// Without mitigations: page table isolation makes each system call flush the
	// emulated processor's translations, twice. Without the check of the timer, whose
	// ticks come late on a busy machine, at which the kernel would panic.
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", "1", "-m", env("STASIS_MEMORY", "4096"),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", k + "/vmlinuz", "-initrd", k + "/initrd",
		"-append", "console=ttyS0 loglevel=4 panic=-1 no_timer_check mitigations=off net.ifnames=0 TERM=dumb process1=/usr/lib/systemd/systemd",
		"-drive", "file=" + m.disk() + ",format=qcow2,if=virtio,cache=writeback",
		"-nic", fmt.Sprintf("user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:%d-:1024", m.port),
		"-serial", "file:" + m.console(m.boots),
		"-monitor", "unix:" + filepath.Join(m.dir, "monitor") + ",server=on,wait=off",
	}
	args = append(args, more...)
	if m.boots == 1 {
		args = append(args, "-drive", "file="+m.seed+",format=raw,if=virtio,readonly=on")
	}
	m.qemu = exec.Command("qemu-system-x86_64", args...)
	var stderr bytes.Buffer
	m.qemu.Stderr = &stderr
	m.booted = time.Now()
	var err error
	if m.done, err = child(m.qemu, func() {
		for _, line := range strings.Split(strings.TrimSpace(stderr.String()), "\n") {
			if line != "" && !strings.Contains(line, "TCG doesn't support requested feature") {
				m.t.Logf("QEMU: %s", line)
			}
		}
	}); err != nil {
		m.t.Fatal(err)
	}
}

// child starts a program that does not outlive the test. When it has ended,
// ended is called, and then done is closed.
func child(c *exec.Cmd, ended func()) (done chan struct{}, err error) {
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	done = make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig follows the thread that forks, which must therefore stay
		started <- c.Start()
		c.Wait() //nolint:errcheck // killed, mostly
		ended()
		close(done)
	}()
	return done, <-started
}

// freePort is one that nobody listens at.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// cut is a power cut.
func (m *machine) cut() {
	if m.qemu == nil || m.qemu.Process == nil {
		return
	}
	m.qemu.Process.Kill() //nolint:errcheck // it may have ended
	<-m.done
	m.qemu = nil
}

// off waits until the machine has turned itself off: -no-reboot makes a reboot
// the end of QEMU.
func (m *machine) off(limit time.Duration) {
	m.t.Helper()
	limit *= slow
	select {
	case <-m.done:
		m.qemu = nil
	case <-time.After(limit):
		m.t.Fatalf("the machine is not off after %v; its console:\n%s", limit, m.tail())
	}
}

func (m *machine) tail() string {
	b, _ := os.ReadFile(m.console(m.boots))
	return string(b[max(0, len(b)-4000):])
}

// sh runs a script in the machine and returns its output; it fails with the
// script.
func (m *machine) sh(limit time.Duration, script string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit*slow)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent/exec", strings.NewReader(script))
	if err != nil {
		return "", err
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return string(out), err
	}
	switch status := resp.Trailer.Get("Exit-Status"); status {
	case "0":
		return string(out), nil
	case "":
		return string(out), errors.New("no exit status: the machine has gone")
	default:
		return string(out), fmt.Errorf("exit status %s: %s", status, out[max(0, len(out)-300):])
	}
}

func (m *machine) must(limit time.Duration, script string) string {
	m.t.Helper()
	out, err := m.sh(limit, script)
	if err != nil {
		m.t.Fatalf("%s: %v", script, err)
	}
	return out
}

// write writes a file in the machine, durably.
func (m *machine) write(name, content string) {
	m.t.Helper()
	temp := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)) // the kubelet passes it over
	m.must(time.Minute, fmt.Sprintf("cat >%s <<'END OF FILE' && sync %s && mv %s %s && sync\n%s\nEND OF FILE\n", temp, temp, temp, name, content))
}

// dial connects to a pod from the node.
func (m *machine) dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", m.agent())
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		c.SetDeadline(deadline) //nolint:errcheck // a socket has deadlines
	}
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", address, address)
	// The agent's answer has no body; what follows is the pod's.
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b...) {
		if _, err := io.ReadFull(c, b); err != nil || len(head) > 4096 {
			c.Close()
			return nil, fmt.Errorf("connecting to %s: %v", address, err)
		}
	}
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200")) {
		c.Close()
		status, _, _ := bytes.Cut(head, []byte("\r\n"))
		return nil, fmt.Errorf("connecting to %s: %s", address, status)
	}
	return c, nil
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// slow stretches the limits of the tests, as STASIS_SLOW says.
var slow = func() time.Duration {
	n, err := strconv.Atoi(env("STASIS_SLOW", "1"))
	if err != nil || n < 1 {
		panic("STASIS_SLOW is no factor")
	}
	return time.Duration(n)
}()

func envInt(t *testing.T, name string, otherwise int) int {
	t.Helper()
	n, err := strconv.Atoi(env(name, strconv.Itoa(otherwise)))
	if err != nil || n < 0 {
		t.Fatalf("%s=%s is no number", name, os.Getenv(name))
	}
	return n
}
