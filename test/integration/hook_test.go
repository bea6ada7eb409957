package integration

import (
	"bufio"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// hearing counts and says when it gets the signal.
const hearing = `trap 'echo signalled' USR2; ` + counting

// hookTrace adds the generation to a file that a template has none of.
const hookTrace = "exec cat /run/stasis/generation >>/hooked"

// TestHook: the hook is run once in each clone, and in a container that goes on
// from its own checkpoint, before the start has returned; not at a cold start.
func TestHook(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	// The source has hooks too: it begins cold.
	src := clonePod(n, name, checkpoint.AnnotationAfterRestore, hookTrace).start("c", "busybox", shell(hearing))
	src.waitCount(10)
	if _, err := src.exec("cat", "/hooked"); err == nil {
		t.Error("a hook was run at a cold start")
	}
	src.makeTemplate(t, name)
	ns, _ := counts(src.log())

	for range 2 {
		c := clonePod(n, name, checkpoint.AnnotationAfterRestore, hookTrace).start("c", "busybox", shell(hearing))
		if got, want := c.mustExec("cat", "/hooked"), c.mustExec("cat", "/run/stasis/generation"); got != want {
			t.Errorf("the hook has written %q when the start returns, want once %q", got, want)
		}
		c.waitCount(ns[len(ns)-1])
		c.p.wantOutcome(event.Restored, "", "template "+name+"; hook in ")
	}

	c := clonePod(n, name, checkpoint.ContainerAnnotation(checkpoint.AnnotationAfterRestore, "c"), "signal SIGUSR2").start("c", "busybox", shell(hearing))
	c.waitLog("signalled")
	c.waitCount(ns[len(ns)-1] + 10)
	if got := strings.Count(c.log(), "signalled"); got != 1 {
		t.Errorf("signalled %d times", got)
	}
	c.p.wantOutcome(event.Restored, "", "template "+name+"; hook in ")

	key := uniqueKey(t)
	a := annotate(key, checkpoint.AnnotationAfterRestore, `exec ["/bin/sh", "-c", "echo own >>/hooked"]`)
	p := n.runPod(key, a)
	c = p.start("c", "busybox", shell(counting))
	c.waitCount(10)
	for i := range 2 {
		c.stop(30)
		p.remove()
		p = n.runPod(key, a)
		c = p.start("c", "busybox", shell(counting))
		if got, want := c.mustExec("cat", "/hooked"), strings.TrimSpace(strings.Repeat("own\n", i+1)); got != want {
			t.Errorf("restore %d: the hooks have written %q", i, got)
		}
		c.waitCount(10)
		wantEvent(t, key, event.Restored, "")
	}
}

// coldCounts waits until a container that begins cold, in the place of one that
// went on, has counted to n.
func (c *ctr) coldCounts(n int) {
	c.p.n.t.Helper()
	eventually(c.p.n.t, "the cold container's counts", func() error {
		ns, _ := counts(c.log())
		if at := slices.Index(ns, 1); at < 0 || len(ns) < at+n || ns[at+n-1] != n {
			return fmt.Errorf("counts %v", ns)
		}
		return nil
	})
}

// TestHookFails: where the hook fails the container starts cold, or not at all,
// with a reason; it has an output, and containerd sees no other than this one.
func TestHookFails(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	const script = `trap 'exit 5' USR1; ` + counting
	src := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "busybox", shell(script))
	src.waitCount(10)
	src.makeTemplate(t, name)
	for what, tc := range map[string]struct {
		hook   string
		strict bool
		opts   []ctrOption
		reason string
		err    string // of the start
	}{
		"exit code": {hook: `exec echo left >/left; echo left >/dev/shm/left; echo "not me"; exit 3`, reason: `exit code 3: "not me"`},
		"no such":   {hook: `exec ["/none"]`, reason: "/none"},
		"ends it":   {hook: `exec kill -USR1 1; sleep 100`, reason: "exit code 137"},
		"hangs":     {hook: `exec trap "" TERM; sleep 1000`, reason: "not done after 10s"},
		"strict":    {hook: `exec exit 3`, strict: true, reason: "exit code 3", err: "exit code 3"},
		"stdin": {hook: `exec exit 3`, opts: []ctrOption{func(c *cri.ContainerConfig) { c.Stdin = true }},
			reason: "exit code 3", err: "it starts cold the next time"},
	} {
		t.Run(what, func(t *testing.T) {
			n := newNode(t)
			a := []string{checkpoint.AnnotationAfterRestore, tc.hook}
			if tc.strict {
				a = append(a, checkpoint.AnnotationOnFailure, "fail")
			}
			p := clonePod(n, name, a...)
			c, err := p.tryCreate("c", "busybox", shell(script), tc.opts...)
			if err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			err = c.tryStart()
			took := time.Since(begin)
			if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("start: %v, want %q", err, tc.err)
			}
			if took > 25*time.Second*time.Duration(slow) {
				t.Errorf("the start took %v", took)
			}
			typ := event.ColdStart
			if tc.strict {
				typ = event.RestoreFail
			}
			p.wantOutcome(typ, "hook", tc.reason)
			for _, e := range events(t, p.config.Metadata.Uid) {
				if e.Type == event.Restored {
					t.Errorf("event %+v", e)
				}
			}
			if tc.err != "" {
				if tc.strict {
					return
				}
				c = p.start("c", "busybox", shell(script), append(tc.opts, attempt(1))...)
				p.wantOutcome(event.ColdStart, "crash-loop", name)
				c.coldCounts(5)
				return
			}
			c.coldCounts(40) // more than what could be in a buffer of somebody who has gone
			if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("state %v", st.State)
			}
			if out := c.mustExec("/bin/sh", "-c", "ls /left 2>/dev/null | wc -l"); out != "0" {
				t.Error("the cold container has the writable layer of the other")
			}
			c.stop(0)
			if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
				t.Errorf("after SIGKILL: state %v, exit code %d", st.State, st.ExitCode)
			}
			c = p.start("c", "busybox", shell(script), attempt(1))
			p.wantOutcome(event.ColdStart, "crash-loop", name)
		})
	}
	if out := run(t, "stasis", "template", "ls"); !strings.Contains(out, "default/"+name) {
		t.Errorf("the template is gone:\n%s", out)
	}
	if left := templatePins(t, name); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}

	assertNothingFrozen(t)
}

// TestHookFailsOwn: a checkpoint of the container's own, which has run, is set
// aside.
func TestHookFailsOwn(t *testing.T) {
	n, key := newNode(t), uniqueKey(t)
	a := annotate(key, checkpoint.AnnotationAfterRestore, "exec exit 3")
	p := n.runPod(key, a)
	c := p.start("c", "busybox", shell(counting))
	c.waitCount(20)
	c.stop(30)
	id := filepath.Base(records(t, key)[0])
	p.remove()
	p = n.runPod(key, a)
	c = p.start("c", "busybox", shell(counting))
	wantEvent(t, key, event.ColdStart, "hook")
	c.coldCounts(5)
	if found, _ := filepath.Glob(filepath.Join(storeRoot, "quarantine", id)); len(found) != 1 {
		t.Errorf("the checkpoint is not in quarantine: %+v", events(t, key))
	}
	if rs := records(t, key); len(rs) != 0 {
		t.Errorf("records %v", rs)
	}
	run(t, "stasis", "rm", id)
}

// upstream answers each line of a connection with the connection's number, on the
// pods' gateway, and keeps who said hello.
func upstream(t *testing.T) (address string, hellos func() []string) {
	t.Helper()
	bridge, err := net.InterfaceByName("cni0")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := bridge.Addrs()
	if err != nil || len(addrs) == 0 {
		t.Fatalf("%v, %v", addrs, err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(addrs[0].(*net.IPNet).IP.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var said []string
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { l.Close() })
	wg.Go(func() { // ends with the listener
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
			go func() { // ends with the connection
				for in := bufio.NewScanner(conn); in.Scan(); {
					if id, ok := strings.CutPrefix(in.Text(), "hello "); ok {
						mu.Lock()
						said = append(said, id)
						mu.Unlock()
					}
					fmt.Fprintln(conn, n)
				}
			}()
		}
	})
	return l.Addr().String(), func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(said)
	}
}

// TestHookJava clones the Java sample: with the hook each clone has a random
// number, an id and a connection of its own from the start; without it they have
// the source's.
func TestHookJava(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	classes := t.TempDir()
	run(t, "javac", "-d", classes, "/src/contrib/samples/java-clone/Service.java")
	source := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"})
	address, hellos := upstream(t)
	command := []string{"/opt/java/bin/java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xms64m", "-Xmx64m", "-XX:+AlwaysPreTouch", "-cp", "/classes", "Service"}
	opts := []ctrOption{withMount(classes, "/classes"), func(c *cri.ContainerConfig) {
		c.Envs = append(c.Envs, &cri.KeyValue{Key: "UPSTREAM", Value: []byte(address)})
	}}
	type answer struct{ id, random, connection string }
	ask := func(p *pod) (a answer) {
		t.Helper()
		eventually(t, "an answer", func() error {
			body, err := p.get("")
			if err == nil {
				_, err = fmt.Sscan(body, &a.id, &a.random, &a.connection)
			}
			return err
		})
		return a
	}
	src := source.start("c", "java", command, opts...)
	first := ask(source)
	if first.connection != "1" || !slices.Equal(hellos(), []string{first.id}) {
		t.Fatalf("the source answers %+v, and said hello as %q", first, hellos())
	}
	src.makeTemplate(t, name)

	const hook = `exec ["wget", "-q", "-O", "-", "http://127.0.0.1:8080/cloned"]`
	seen := map[string]bool{first.id: true, first.random: true}
	for i := range 2 {
		p := clonePod(n, name, checkpoint.AnnotationAfterRestore, hook)
		p.start("c", "java", command, opts...)
		said := hellos() // when the start has returned
		p.wantOutcome(event.Restored, "", "hook in ")
		a := ask(p)
		if seen[a.id] || seen[a.random] {
			t.Errorf("clone %d answers %+v; there were %v", i, a, seen)
		}
		seen[a.id], seen[a.random] = true, true
		if len(said) != i+2 || said[i+1] != a.id || a.connection != fmt.Sprint(i+2) {
			t.Errorf("clone %d answers %+v; hello was said as %q", i, a, said)
		}
		t.Logf("clone %d: %+v; %s", i, a, events(t, p.config.Metadata.Uid)[0].Reason)
		p.removeEventually()
	}

	// Without it: the numbers that the source would have drawn next, in each.
	var same answer
	for i := range 2 {
		p := clonePod(n, name)
		p.start("c", "java", command, opts...)
		p.wantOutcome(event.Restored, "", name)
		a := ask(p)
		if i == 0 {
			same = a
		}
		if a.id != first.id || a.random != same.random {
			t.Errorf("without the hook clone %d answers %+v, the source %+v, the other %+v", i, a, first, same)
		}
		p.removeEventually()
	}

	// While memory is being filled, too, the failure of a hook ends it.
	p := clonePod(n, name, checkpoint.AnnotationAfterRestore, "exec wget -q -O - http://127.0.0.1:8080/none/; exit 3")
	p.start("c", "java", command, opts...)
	p.wantOutcome(event.ColdStart, "hook", "exit code 3")
	if a := ask(p); seen[a.id] {
		t.Errorf("it did not begin cold: %+v", a)
	}
	assertNothingFrozen(t)
}
