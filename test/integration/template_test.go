package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// source starts a container that may become a template.
func (n *node) source(name string) *ctr {
	n.t.Helper()
	p := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"})
	return p.start("c", "busybox", shell(counting))
}

// makeTemplate makes a template of a container and returns the version.
func (c *ctr) makeTemplate(t *testing.T, name string) string {
	t.Helper()
	var r struct {
		Version string
	}
	out := run(t, "stasis", "template", "create", name, "-o", "json", "--pod", c.p.config.Metadata.Namespace+"/"+c.p.config.Metadata.Name)
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return r.Version
}

// removeTemplate leaves nothing to the next test.
func removeTemplate(t *testing.T, name string) {
	t.Cleanup(func() {
		if out, err := exec.Command("stasis", "template", "rm", "default/"+name).CombinedOutput(); err != nil && !strings.Contains(string(out), "no template") {
			t.Errorf("template rm: %v: %s", err, out)
		}
	})
}

func clonePod(n *node, template string, more ...string) *pod {
	n.t.Helper()
	a := map[string]string{checkpoint.AnnotationTemplate: template}
	for i := 0; i+1 < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return n.runPod(template+"-clone", a)
}

// wantOutcome fails unless the newest event of the pod has the type and code
// and a reason with the part.
func (p *pod) wantOutcome(typ event.Type, code, part string) {
	p.n.t.Helper()
	if e := wantEvent(p.n.t, p.config.Metadata.Uid, typ, code); !strings.Contains(e.Reason, part) {
		p.n.t.Errorf("event %s: reason %q, want %q in it", typ, e.Reason, part)
	}
}

// TestTemplate makes a template of a container that runs on. Several containers
// at once go on from it, each with its own host name, after the source is gone
// as well as while it is there.
func TestTemplate(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	src := n.source(name)
	src.mustExec("/bin/sh", "-c", "echo layer >/f; echo shm >/dev/shm/f")
	src.waitCount(10)
	generations := map[string]int{src.mustExec("cat", "/run/stasis/generation"): -1}
	version := src.makeTemplate(t, name)
	ns, _ := counts(src.log())
	at := ns[len(ns)-1]
	src.waitCount(at + 5) // it runs on
	src.p.wantOutcome(event.Dumped, "", "template "+name)
	if out := run(t, "stasis", "template", "ls"); !strings.Contains(out, "default/"+name) || !strings.Contains(out, version) {
		t.Errorf("ls:\n%s", out)
	}
	if out := run(t, "stasis", "template", "inspect", "default/"+name); !strings.Contains(out, "default/"+name) || !strings.Contains(out, "sh") {
		t.Errorf("inspect:\n%s", out)
	}
	run(t, "stasis", "template", "verify", "default/"+name+"@"+version)

	first := clonePod(n, name).start("c", "busybox", shell(counting))
	first.waitCount(at)
	src.stop(1)
	if es := events(t, src.p.config.Metadata.Uid); len(es) != 1 {
		t.Errorf("the source has events besides that of the template: %+v", es)
	}
	src.p.remove()

	clones := []*ctr{first}
	for range 3 {
		clones = append(clones, &ctr{p: clonePod(n, name)})
	}
	var wg sync.WaitGroup
	for i, c := range clones[1:] {
		wg.Go(func() {
			got, err := c.p.tryCreate("c", "busybox", shell(counting))
			if err == nil {
				err = got.tryStart()
			}
			if err != nil {
				t.Errorf("clone %d: %v", i, err)
				return
			}
			*c = *got
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	begin := 0
	for i, c := range clones {
		c.waitCount(at + 10)
		ns, hostname := counts(c.log())
		if begin == 0 {
			begin = ns[0]
		}
		if ns[0] != begin || ns[0] < 10 || ns[0] > at+1 {
			t.Errorf("clone %d begins with %d, want %d, what the source had counted", i, ns[0], begin)
		}
		if hostname != c.p.config.Hostname {
			t.Errorf("clone %d: host name %q, want %q", i, hostname, c.p.config.Hostname)
		}
		if got := c.mustExec("cat", "/f", "/dev/shm/f"); got != "layer\nshm" {
			t.Errorf("clone %d: files %q", i, got)
		}
		c.mustExec("/bin/sh", "-c", fmt.Sprintf("echo %d >/f", i))
		generation := c.mustExec("cat", "/run/stasis/generation")
		if other, ok := generations[generation]; ok || len(generation) != 32 {
			t.Errorf("clones %d and %d have generation %q", i, other, generation)
		}
		generations[generation] = i
		if _, err := c.exec("/bin/sh", "-c", "echo x >/run/stasis/generation || touch /run/stasis/x"); err == nil {
			t.Error("a container may write its generation")
		}
		c.p.wantOutcome(event.Restored, "", "template "+name)
	}
	sources, err := filepath.Glob("/run/stasis/generations/" + first.id + "/generation")
	if err != nil || len(sources) != 1 {
		t.Errorf("generation on the node: %v, %v", sources, err)
	}
	for i, c := range clones {
		if got := c.mustExec("cat", "/f"); got != fmt.Sprint(i) {
			t.Errorf("clone %d reads %q from its own layer", i, got)
		}
		c.stop(1)
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED {
			t.Errorf("clone %d: %v after its stop", i, st.State)
		}
	}
	if left := templatePins(t, name); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
	first.p.remove()
	if _, err := os.Stat(sources[0]); !os.IsNotExist(err) {
		t.Errorf("generation of a removed container: %v", err)
	}
	t.Logf("the template has count %d; the source was at %d", begin, at)
}

func templatePins(t *testing.T, name string) []string {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(storeRoot, "templates/default", name, "*.pin"))
	if err != nil {
		t.Fatal(err)
	}
	return pins
}

// TestTemplateVersions: a second version is for new clones; the first is gone,
// and who began from it runs on.
func TestTemplateVersions(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	src := n.source(name)
	src.waitCount(5)
	v1 := src.makeTemplate(t, name)
	c1 := clonePod(n, name).start("c", "busybox", shell(counting))
	src.waitCount(60)
	v2 := src.makeTemplate(t, name)
	c2 := clonePod(n, name).start("c", "busybox", shell(counting))
	c2.waitCount(61)
	if ns, _ := counts(c2.log()); ns[0] < 60 {
		t.Errorf("the clone of the second version begins with %d", ns[0])
	}
	ns, _ := counts(c1.log())
	c1.waitCount(ns[len(ns)-1] + 5)
	out := run(t, "stasis", "template", "ls")
	if strings.Contains(out, v1) || !strings.Contains(out, v2) {
		t.Errorf("want %s only:\n%s", v2, out)
	}
}

// TestTemplateMismatch: a container that is not as the source was starts cold,
// or not at all where it asks for that, and the event names what differs.
func TestTemplateMismatch(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	src := n.source(name)
	src.waitCount(5)
	src.makeTemplate(t, name)
	env := func(kv ...string) ctrOption {
		return func(c *cri.ContainerConfig) {
			for i := 0; i < len(kv); i += 2 {
				c.Envs = append(c.Envs, &cri.KeyValue{Key: kv[i], Value: []byte(kv[i+1])})
			}
		}
	}
	services := env("SHOP_SERVICE_HOST", "10.0.0.7", "SHOP_SERVICE_PORT", "80", "SHOP_PORT", "tcp://10.0.0.7:80", "SHOP_PORT_80_TCP_ADDR", "10.0.0.7")
	for what, tc := range map[string]struct {
		template, image, command string
		opts                     []ctrOption
		pod                      []string // annotations
		namespace                string
		code, reason             string // of the cold start; empty code: it goes on
	}{
		"same":            {},
		"services":        {opts: []ctrOption{services}},
		"image":           {image: "python", code: "mismatch", reason: "image: the template is of sha256:"},
		"args":            {command: counting + "; exit 1", code: "mismatch", reason: "differs in args"},
		"env":             {opts: []ctrOption{env("APP_PORT", "80")}, code: "mismatch", reason: "differs in env"},
		"mounts":          {opts: []ctrOption{withMount("/var/log", "/logs")}, code: "mismatch", reason: "differs in mounts"},
		"no such":         {template: name + "x", code: "missing", reason: "template default/" + name + "x"},
		"other namespace": {namespace: "other", code: "missing", reason: "template other/" + name},
	} {
		for _, strict := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, strict %v", what, strict), func(t *testing.T) {
				n := newNode(t)
				a := map[string]string{checkpoint.AnnotationTemplate: name}
				if tc.template != "" {
					a[checkpoint.AnnotationTemplate] = tc.template
				}
				if strict {
					a[checkpoint.AnnotationOnFailure] = "fail"
				}
				p := n.runPod(name+"-clone", a, func(c *cri.PodSandboxConfig) {
					if tc.namespace != "" {
						c.Metadata.Namespace = tc.namespace
					}
				})
				image, command := "busybox", counting
				if tc.image != "" {
					image = tc.image
				}
				if tc.command != "" {
					command = tc.command
				}
				c, err := p.tryCreate("c", image, shell(command), tc.opts...)
				if err == nil {
					err = c.tryStart()
				}
				if strict && tc.code != "" {
					if err == nil {
						t.Error("it started")
					}
					p.wantOutcome(event.RestoreFail, tc.code, "")
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				c.waitCount(0)
				ns, _ := counts(c.log())
				if warm := ns[0] > 1; warm != (tc.code == "") {
					t.Errorf("it begins with count %d", ns[0])
				}
				if tc.code != "" {
					p.wantOutcome(event.ColdStart, tc.code, tc.reason)
				}
			})
		}
	}
}

// TestTemplateDamaged: verify finds one flipped bit, and no container begins
// from such a template.
func TestTemplateDamaged(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	src := n.source(name)
	src.waitCount(5)
	version := src.makeTemplate(t, name)
	pages, err := filepath.Glob(filepath.Join(storeRoot, "templates/default", name, version, "checkpoint/pages-*.img"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages: %v", err)
	}
	b, err := os.ReadFile(pages[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(pages[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("stasis", "template", "verify", "default/"+name).CombinedOutput(); err == nil || !strings.Contains(string(out), "checksum") {
		t.Errorf("verify: %v: %s", err, out)
	}
	c := clonePod(n, name).start("c", "busybox", shell(counting))
	c.waitCount(0)
	if ns, _ := counts(c.log()); ns[0] != 1 {
		t.Errorf("it begins with count %d", ns[0])
	}
	c.p.wantOutcome(event.ColdStart, "corrupt", "checksum")
	if out := run(t, "stasis", "template", "ls"); strings.Contains(out, version) {
		t.Errorf("it is still a template:\n%s", out)
	}
	if out := run(t, "stasis", "ls", "--state", "quarantined"); !strings.Contains(out, version) {
		t.Errorf("it is not quarantined:\n%s", out)
	}
	run(t, "stasis", "rm", version)
}

// TestTemplateRemovedWhileCloning: each clone either goes on from the template or
// starts cold, and the template is gone in the end.
func TestTemplateRemovedWhileCloning(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	src := n.source(name)
	src.waitCount(5)
	src.makeTemplate(t, name)
	clones := make([]*ctr, 4)
	for i := range clones {
		clones[i] = &ctr{p: clonePod(n, name)}
	}
	var wg sync.WaitGroup
	for i, c := range clones {
		wg.Go(func() {
			got, err := c.p.tryCreate("c", "busybox", shell(counting))
			if err == nil {
				err = got.tryStart()
			}
			if err != nil {
				t.Errorf("clone %d: %v", i, err)
				return
			}
			*c = *got
		})
	}
	for end := time.Now().Add(deadline); len(templatePins(t, name)) == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	busy := 0
	eventually(t, "removal", func() error {
		out, err := exec.Command("stasis", "template", "rm", "default/"+name).CombinedOutput()
		if err == nil {
			return nil
		}
		if busy++; !strings.Contains(string(out), "creates container") {
			t.Errorf("rm: %v: %s", err, out)
		}
		return fmt.Errorf("%w: %s", err, out)
	})
	wg.Wait()
	if t.Failed() {
		return
	}
	warm := 0
	for _, c := range clones {
		c.waitCount(0)
		if ns, _ := counts(c.log()); ns[0] > 1 {
			warm++
			c.p.wantOutcome(event.Restored, "", name)
		} else {
			c.p.wantOutcome(event.ColdStart, "missing", name)
		}
	}
	if left := templatePins(t, name); len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
	if warm == 0 {
		t.Error("who had pinned it did not go on from it")
	}
	t.Logf("%d of %d clones are warm; rm was refused %d times", warm, len(clones), busy)
}

// talking keeps a connection of its own alive and says when it is lost.
const talking = `
import socket, threading, time
server = socket.create_server(("", 7000))
def answer(c):
    try:
        while c.send(c.recv(64)): pass
    except OSError: pass
def serve():
    while True: threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
connection, lost, n = socket.create_connection(("127.0.0.1", 7000)), 0, 0
while True:
    n += 1
    try:
        connection.sendall(b"x")
        if not connection.recv(64): raise OSError("closed")
    except OSError:
        lost += 1
        connection = socket.create_connection(("127.0.0.1", 7000))
    print("count", n, "lost", lost, flush=True)
    time.sleep(0.05)
`

// TestTemplateConnections: the source keeps its connections, a clone finds them
// closed, and its listening socket takes new ones.
func TestTemplateConnections(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	p := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template", checkpoint.AnnotationTCP: "keep"})
	src := p.start("c", "python", []string{"python3", "-c", talking})
	src.waitCount(10)
	src.makeTemplate(t, name)
	ns, _ := counts(src.log())
	at := src.waitCount(ns[len(ns)-1] + 10)
	if log := src.log(); strings.Contains(log, "lost 1") {
		t.Errorf("the source lost its connection: %s", tail(log, 500))
	}
	c := clonePod(n, name).start("c", "python", []string{"python3", "-c", talking})
	c.waitCount(at)
	if ns, _ := counts(c.log()); ns[0] < 10 {
		t.Errorf("the clone begins with count %d", ns[0])
	}
	if log := c.log(); !strings.Contains(log, "lost 1") || strings.Contains(log, "lost 2") {
		t.Errorf("the clone's connection was not closed, once: %s", tail(log, 500))
	}
}
