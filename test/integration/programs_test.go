package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// stateful holds state of every kind that a program may have and answers, on
// TCP port 7000, one JSON line that proves it.
const stateful = `
import json, os, socket, sys, threading, time, fcntl, hashlib, signal
state = {"steps": 0, "ticks": 0}
heap = bytearray(os.urandom(8 << 20))
unlinked = open("/tmp/gone", "w+"); unlinked.write("unlinked content"); unlinked.flush(); os.unlink("/tmp/gone")
offset = open("/tmp/offset", "w+"); offset.write("0123456789"); offset.flush(); offset.seek(4)
lock = open("/tmp/lock", "w"); fcntl.flock(lock, fcntl.LOCK_EX)
r, w = os.pipe(); os.write(w, b"in the pipe")
ua, ub = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM); ua.send(b"in the socket")
ul = socket.socket(socket.AF_UNIX); ul.bind("/tmp/sock"); ul.listen(4)
uc = socket.socket(socket.AF_UNIX); uc.connect("/tmp/sock"); us, _ = ul.accept(); uc.send(b"connected")
child = os.fork()
if child == 0:
    n = 0
    while True:
        n += 1
        with open("/tmp/child.new", "w") as f: f.write(str(n))
        os.rename("/tmp/child.new", "/tmp/child")
        time.sleep(0.02)
def step():
    while True:
        state["steps"] += 1
        time.sleep(0.01)
for _ in range(8): threading.Thread(target=step, daemon=True).start()
# Expires while the container is frozen, and is not read before the dump.
timer = os.timerfd_create(time.CLOCK_MONOTONIC)
os.timerfd_settime(timer, initial=0.02, interval=0.02)
def tick():
    while True: state["ticks"] += int.from_bytes(os.read(timer, 8), "little")
threading.Thread(target=tick, daemon=True).start()
peek = socket.MSG_PEEK | socket.MSG_DONTWAIT
srv = socket.socket(); srv.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
srv.bind(("0.0.0.0", 7000)); srv.listen(16)
pipe = b""
while True:
    c, _ = srv.accept()
    try:
        line = c.makefile("r").readline()
        if not pipe: pipe = os.read(r, 100)
        unlinked.seek(0)
        c.sendall((json.dumps({
            "heap": hashlib.sha256(heap).hexdigest(), "steps": state["steps"], "ticks": state["ticks"],
            "unlinked": unlinked.read(), "links": os.fstat(unlinked.fileno()).st_nlink,
            "offset": offset.tell(), "pipe": pipe.decode(), "pair": ub.recv(100, peek).decode(),
            "unix": us.recv(100, peek).decode(), "threads": threading.active_count(),
            "child": int(open("/tmp/child").read()), "childAlive": os.waitpid(child, os.WNOHANG) == (0, 0),
        }) + "\n").encode())
        if line.strip() == "hold": held = c
        else: c.close()
    except Exception as e:
        try: c.sendall((json.dumps({"error": repr(e)}) + "\n").encode())
        except OSError: pass
`

type programState struct {
	Heap, Unlinked, Pipe, Pair, Unix, Error string
	Steps, Ticks, Links                     int
	Offset, Threads, Child                  int
	ChildAlive                              bool
}

func (p *pod) ip() string {
	p.n.t.Helper()
	r, err := p.n.rt.PodSandboxStatus(p.n.ctx(), podStatusRequest(p.id))
	if err != nil {
		p.n.t.Fatal(err)
	}
	return r.Status.GetNetwork().GetIp()
}

// ask sends one line to the program and returns its answer; with hold the
// connection stays open on both sides.
func ask(t *testing.T, ip, line string) (st programState, conn net.Conn) {
	t.Helper()
	eventually(t, "answer of the program", func() error {
		var err error
		conn, err = net.DialTimeout("tcp", net.JoinHostPort(ip, "7000"), 5*time.Second)
		if err != nil {
			return err
		}
		conn.SetDeadline(time.Now().Add(time.Duration(slow) * 10 * time.Second))
		if _, err := fmt.Fprintln(conn, line); err != nil {
			return err
		}
		st = programState{}
		return json.NewDecoder(conn).Decode(&st)
	})
	if st.Error != "" {
		t.Fatalf("the program answers %s", st.Error)
	}
	return st, conn
}

// TestProgramState dumps a program with threads, a child process, a timer,
// unlinked and locked files, a pipe, unix sockets, a listening and an established TCP
// socket, and has it prove all of it afterwards, in a pod with another address.
func TestProgramState(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	command := []string{"python3", "-c", stateful}
	p := n.runPod(key, annotate(key))
	c := p.start("c", "python", command)
	ask(t, p.ip(), "warm")
	before, held := ask(t, p.ip(), "hold")
	defer held.Close()
	oldIP := p.ip()
	c.stop(30)
	if es := events(t, key); len(es) == 0 || es[0].Type != event.Dumped {
		t.Fatalf("not dumped: %+v", es)
	}
	p.remove()

	p = n.runPod(key, annotate(key))
	c = p.start("c", "python", command)
	wantEvent(t, key, event.Restored, "")
	after, conn := ask(t, p.ip(), "again")
	conn.Close()
	t.Logf("address %s, then %s; %d steps, then %d", oldIP, p.ip(), before.Steps, after.Steps)
	if after.Steps < before.Steps || after.Child < before.Child {
		t.Errorf("threads or child began anew: %+v, then %+v", before, after)
	}
	if !after.ChildAlive || after.Links != 0 {
		t.Errorf("child alive %v, links of the unlinked file %d", after.ChildAlive, after.Links)
	}
	same := func(s programState) programState {
		return programState{Heap: s.Heap, Unlinked: s.Unlinked, Pipe: s.Pipe, Pair: s.Pair, Unix: s.Unix, Offset: s.Offset, Threads: s.Threads}
	}
	if same(before) != same(after) {
		t.Errorf("state changed:\n%+v\n%+v", same(before), same(after))
	}
	child := after.Child
	eventually(t, "the child's work", func() error {
		st, conn := ask(t, p.ip(), "more")
		conn.Close()
		if st.Child <= child || st.Steps <= after.Steps || st.Ticks <= after.Ticks {
			return fmt.Errorf("child at %d, steps at %d, timer at %d", st.Child, st.Steps, st.Ticks)
		}
		return nil
	})
	c.stop(30)
	p.remove()
}

// TestAnswersDuringDump: while half a gigabyte is being dumped every call is
// answered within its time, and a second stop does no harm.
func TestAnswersDuringDump(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "python", []string{"python3", "-c", bigHeap})
	c.waitLog("ready")
	stopped := make(chan error, 1)
	begin := time.Now()
	go func() {
		_, err := n.rt.StopContainer(n.ctx(), stopRequest(c.id, 60))
		stopped <- err
	}()
	// The stage directory appears when the dump begins.
	eventually(t, "the dump's stage", func() error {
		m := stages(key)
		if len(m) == 0 {
			return fmt.Errorf("no stage after %s", time.Since(begin))
		}
		return nil
	})
	answered := 0
loop:
	for {
		select {
		case err := <-stopped:
			if err != nil {
				t.Errorf("stop: %v", err)
			}
			break loop
		default:
		}
		t0 := time.Now()
		if st := c.status(); st.ExitCode == 0 && st.State == 2 {
			t.Errorf("exited with 0 during the dump")
		}
		_, statsErr := n.rt.ContainerStats(n.ctx(), statsRequest(c.id))
		_, execErr := c.exec("true")
		if d := time.Since(t0); d > 2*time.Second {
			t.Errorf("status, stats and exec took %s (stats: %v, exec: %v)", d, statsErr, execErr)
		}
		answered++
	}
	t.Logf("%d rounds of status, stats and exec were answered within %s", answered, time.Since(begin))
	if answered == 0 {
		t.Error("the dump was over before anything could be asked")
	}
	wantEvent(t, key, event.Dumped, "")
}

// bigHeap fills 512 MB with what does not compress or repeat.
const bigHeap = `
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *a: sys.exit(7))
heap = [os.urandom(1 << 20) for _ in range(512)]
print("ready", flush=True)
while True: time.sleep(0.05)
`

// TestSIGKILLDuringDump: SIGKILL ends the dump and the container, and leaves
// neither a record nor a stage.
func TestSIGKILLDuringDump(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	c := p.start("c", "python", []string{"python3", "-c", bigHeap})
	c.waitLog("ready")
	go n.rt.StopContainer(n.ctx(), stopRequest(c.id, 60))
	eventually(t, "the dump's stage", func() error {
		if m := stages(key); len(m) == 0 {
			return fmt.Errorf("no stage")
		}
		return nil
	})
	begin := time.Now()
	c.stop(0)
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("SIGKILL took %s", d)
	}
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", st.ExitCode)
	}
	es := events(t, key)
	if len(es) == 0 {
		t.Fatal("no event")
	}
	switch last := es[len(es)-1]; {
	case last.Type == event.DumpFailed && last.ReasonCode == "aborted":
		if rs := records(t, key); len(rs) != 0 {
			t.Errorf("aborted, but there is %v", rs)
		}
	case last.Type == event.Dumped: // the commit won the race; then the record is whole
		if rs := records(t, key); len(rs) != 1 {
			t.Errorf("dumped, but there is %v", rs)
		}
	default:
		t.Errorf("last event %+v", last)
	}
	if m := stages(key); len(m) != 0 {
		t.Errorf("stage left: %v", m)
	}
	p.remove()
}

// TestRefusedDump: a container that cannot be dumped gets its signal, with its
// own exit code, and the reason is told.
func TestRefusedDump(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	p := n.runPod(key, annotate(key))
	// A process under ptrace cannot be seized by CRIU.
	c := p.start("c", "python", []string{"python3", "-c", `
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None)
if os.fork() == 0:
    libc.ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
    while True: time.sleep(1)
signal.signal(signal.SIGTERM, lambda *a: os._exit(7))
print("ready", flush=True)
while True: time.sleep(0.05)
`})
	c.waitLog("ready")
	c.stop(30)
	if st := c.status(); st.ExitCode != 7 {
		t.Errorf("exit code %d, want the program's own 7", st.ExitCode)
	}
	e := wantEvent(t, key, event.DumpFailed, "criu")
	if e.Reason == "" {
		t.Error("no reason")
	}
	t.Logf("reason: %s", e.Reason)
	if rs := records(t, key); len(rs) != 0 {
		t.Errorf("records %v", rs)
	}
}
