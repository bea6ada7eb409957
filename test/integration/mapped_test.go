package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
)

// mappedBytes is how much of the process is mapped from a file of pages, and how
// much of that it has for itself, because it has written to it.
func (c *ctr) mappedBytes() (size, own int64) {
	c.p.n.t.Helper()
	for _, m := range c.smaps() {
		if strings.HasPrefix(m.name, "/pages-") {
			size += m.size
			own += m.anonymous
		}
	}
	return size, own
}

// pss is the process's memory, a page that is shared by several counted in parts.
func (c *ctr) pss() int64 {
	c.p.n.t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc", fmt.Sprint(c.pid()), "smaps_rollup"))
	if err != nil {
		c.p.n.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "Pss: %d kB", &kb); n == 1 {
			return kb << 10
		}
	}
	c.p.n.t.Fatalf("no Pss in %s", b)
	return 0
}

// mappedClone starts a clone with mapped memory and compares every byte of its heap.
func mappedClone(t *testing.T, n *node, name string, src instance, command []string, gc bool, more ...string) *ctr {
	t.Helper()
	p := clonePod(n, name, append(more, checkpoint.AnnotationMemory, "mapped")...)
	c, err := p.clone(command)
	if err != nil {
		t.Fatal(err)
	}
	if warm, err := p.checkClone(src, gc); err != nil || !warm {
		t.Fatalf("from the template: %v, %v; events %+v", warm, err, events(t, p.config.Metadata.Uid))
	}
	return c
}

// TestMapped: clones of a JVM have the template's memory mapped. They share what
// they do not write to, each has its own of what it writes, and neither the template
// nor another clone has any of that. They go on when the template is gone.
func TestMapped(t *testing.T) {
	const mb = 64
	n, name := newNode(t), uniqueKey(t)
	l := newLeavings(name)
	removeTemplate(t, name)
	command := warm(mb, 20, "-XX:+UseSerialGC", "-Xmx160m", "-Dwarm.block=8")
	source, src := warmTemplate(t, n, name, command)
	if out := run(t, "stasis", "template", "inspect", "default/"+name); !regexp.MustCompile(`Mapped memory: +[0-9.]+ MiB in [0-9]+ mappings`).MatchString(out) {
		t.Errorf("inspect:\n%s", out)
	}

	var clones []*ctr
	for range 4 {
		clones = append(clones, mappedClone(t, n, name, src, command, false))
	}
	var sum int64
	for _, c := range clones {
		c.p.wantOutcome(event.Restored, "", "of memory are mapped from it")
		size, own := c.mappedBytes()
		if size < mb<<20 || own > size/4 {
			t.Errorf("%d MiB are mapped, of which %d are its own", size>>20, own>>20)
		}
		if pids := holders(); len(pids) > 0 {
			t.Errorf("there is a holder, %v", pids)
		}
		sum += c.pss()
		c.p.wantThreads(20)
	}
	lazy := clonePod(n, name)
	whole, err := lazy.clone(command)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lazy.checkClone(src, false); err != nil {
		t.Fatal(err)
	}
	if size, _ := whole.mappedBytes(); size != 0 {
		t.Errorf("%d MiB are mapped though nobody asked for it", size>>20)
	}
	one := whole.pss()
	t.Logf("four clones have %d MiB, one that shares nothing %d", sum>>20, one>>20)
	if sum > 4*one*45/100 { // what they write in the first moments is much of so small a heap
		t.Errorf("four clones have %d MiB, one that shares nothing %d", sum>>20, one>>20)
	}

	// The collector moves the heap in one of them; the others do not notice.
	if _, err := clones[0].p.checkClone(src, true); err != nil {
		t.Error(err)
	}
	if _, own := clones[0].mappedBytes(); own < 1<<20 {
		t.Errorf("after a collection %d KiB are its own", own>>10)
	}
	for _, c := range clones[1:] {
		if _, err := c.p.checkClone(src, false); err != nil {
			t.Error(err)
		}
	}

	// malloc enlarges a block: it must be moved, for the file ends somewhere.
	if got, err := clones[3].p.get("grow"); err != nil || got != "grown" {
		t.Errorf("a block of malloc: %q, %v", got, err)
	}
	clones[3].p.wantThreads(20)

	// No dump of it: an error that says why, and it runs on.
	archive := filepath.Join(t.TempDir(), "checkpoint.tar")
	_, err = n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{ContainerId: clones[1].id, Location: archive, Timeout: 50})
	if err == nil || !strings.Contains(err.Error(), "is mapped from template") {
		t.Errorf("checkpoint: %v", err)
	}
	_, err = clones[1].shim().Snapshot(n.ctx(), clones[1].id, name+"-2")
	if err == nil || !strings.Contains(err.Error(), "is mapped from template") {
		t.Errorf("template of it: %v", err)
	}
	clones[1].p.wantThreads(20)

	run(t, "stasis", "template", "rm", "default/"+name)
	for i, c := range clones {
		if _, err := c.p.check(i == 2); err != nil {
			t.Errorf("after the template's removal: %v", err)
		}
	}
	for _, c := range clones {
		l.remove(c.p)
	}
	l.remove(lazy)
	l.remove(source)
	l.check(t)
}

// TestMappedOtherwise: what cannot be mapped is restored as without the annotation,
// and the event says why; one that keeps checkpoints of its own can be dumped.
func TestMappedOtherwise(t *testing.T) {
	n := newNode(t)
	t.Run("no JVM", func(t *testing.T) {
		name := uniqueKey(t)
		removeTemplate(t, name)
		command := patterned(80, 1, false, "marker-"+name)
		src := n.runPod(name, map[string]string{checkpoint.AnnotationPolicy: "template"}).start("c", "python", command)
		before := src.waitRounds(1)
		src.makeTemplate(t, name)
		src.p.remove()
		c := clonePod(n, name, checkpoint.AnnotationMemory, "mapped").start("c", "python", command)
		c.wantLazy()
		c.wantGoesOn(before)
		c.p.wantOutcome(event.Restored, "", "memory is not mapped: process 1: it is no Java virtual machine")
		c.p.remove()
	})
	t.Run("no images", func(t *testing.T) { // a template of an older stasis
		name := uniqueKey(t)
		removeTemplate(t, name)
		command := warm(48, 0, "-XX:+UseSerialGC", "-Xmx160m")
		source, src := warmTemplate(t, n, name, command)
		source.remove()
		dir := onlyVersion(t, name)
		m := readManifest(t, dir)
		m.Files = slices.DeleteFunc(m.Files, checkpoint.File.OfMapped)
		b, err := m.Encode()
		if err := errors.Join(err, os.WriteFile(filepath.Join(dir, checkpoint.ManifestFile), b, 0o600), os.RemoveAll(filepath.Join(dir, checkpoint.MappedDir))); err != nil {
			t.Fatal(err)
		}
		p := clonePod(n, name, checkpoint.AnnotationMemory, "mapped")
		if _, err := p.clone(command); err != nil {
			t.Fatal(err)
		}
		if i, err := p.check(true); err != nil || i.id != src.id {
			t.Fatalf("%+v, %v", i, err)
		}
		p.wantOutcome(event.Restored, "", "memory is not mapped: it was made without images for that")
		p.remove()
	})
	t.Run("policy", func(t *testing.T) {
		name, key := uniqueKey(t), uniqueKey(t)
		removeTemplate(t, name)
		command := warm(48, 0, "-XX:+UseSerialGC", "-Xmx160m")
		source, src := warmTemplate(t, n, name, command)
		source.remove()
		a := annotate(key, checkpoint.AnnotationTemplate, name, checkpoint.AnnotationMemory, "mapped")
		p := n.runPod(key, a)
		c, err := p.clone(command)
		if err != nil {
			t.Fatal(err)
		}
		if i, err := p.check(false); err != nil || i.id != src.id {
			t.Fatalf("%+v, %v", i, err)
		}
		if e := wantEvent(t, key, event.Restored, ""); !strings.Contains(e.Reason, "memory is not mapped: its policy is resume") {
			t.Errorf("reason %q", e.Reason)
		}
		c.stop(60)
		wantEvent(t, key, event.Dumped, "")
		p.remove()
		p = n.runPod(key, a)
		if _, err = p.clone(command); err != nil {
			t.Fatal(err)
		}
		if i, err := p.check(true); err != nil || i.id != src.id {
			t.Fatalf("%+v, %v", i, err)
		}
	})
}

// TestMappedDamage: memory that is not as its checksums say is never mapped, though
// other clones have been, and files that have changed since they were checked are
// checked again.
func TestMappedDamage(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	command := warm(48, 0, "-XX:+UseSerialGC", "-Xmx160m")
	source, src := warmTemplate(t, n, name, command)
	record, err := os.ReadFile("/run/stasis/checked/default." + name)
	if err != nil || !bytes.Contains(record, []byte("pages-1.img")) {
		t.Errorf("record of what was made: %s, %v", record, err)
	}
	mappedClone(t, n, name, src, command, false).p.remove()
	if err := os.Remove("/run/stasis/checked/default." + name); err != nil { // as after a boot
		t.Fatal(err)
	}
	first := mappedClone(t, n, name, src, command, false)
	if again, err := os.ReadFile("/run/stasis/checked/default." + name); err != nil || !bytes.Equal(again, record) {
		t.Errorf("record of what a clone has checked: %s, %v, was %s", again, err, record)
	}
	first.p.remove() // it has the file mapped that is damaged
	source.remove()
	damage(t, onlyVersion(t, name), "checkpoint/pages-1.img", false, flip)
	wantNoClone(t, n, name, src, command)
	// As well the images that are laid out for clones.
	for _, file := range []string{"mm-1.img", "pages-1.img", criu.MappedIndex} {
		t.Run(file, func(t *testing.T) {
			n, name := newNode(t), uniqueKey(t)
			removeTemplate(t, name)
			source, src := warmTemplate(t, n, name, command)
			source.remove()
			damage(t, onlyVersion(t, name), filepath.Join(checkpoint.MappedDir, file), false, flip)
			wantNoClone(t, n, name, src, command)
		})
	}
}

// onlyVersion is the directory of a template's version, of which there is one.
func onlyVersion(t *testing.T, name string) string {
	t.Helper()
	dirs, _ := filepath.Glob(filepath.Join(storeRoot, "templates/default", name, "*"))
	if len(dirs) != 1 {
		t.Fatalf("versions %v", dirs)
	}
	return dirs[0]
}

// wantNoClone starts what asks for a damaged template, and begins cold.
func wantNoClone(t *testing.T, n *node, name string, src instance, command []string) {
	t.Helper()
	p := clonePod(n, name, checkpoint.AnnotationMemory, "mapped")
	if _, err := p.clone(command); err != nil {
		t.Fatal(err)
	}
	if i, err := p.check(false); err != nil || i.id == src.id {
		t.Errorf("it began from a damaged template: %+v, %v", i, err)
	}
	wantEvent(t, p.config.Metadata.Uid, event.Quarantined, "corrupt")
	p.remove()
}

// TestMappedFails: where CRIU cannot restore what is mapped it reads the memory, and the
// event says so.
func TestMappedFails(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	command := warm(48, 0, "-XX:+UseSerialGC", "-Xmx160m")
	source, src := warmTemplate(t, n, name, command)
	source.remove()
	p := clonePod(n, name, checkpoint.AnnotationMemory, "mapped")
	c, err := p.tryCreate("c", "java", command)
	if err != nil {
		t.Fatal(err)
	}
	// What was linked for the mapped restore is taken away before CRIU reads it.
	taken := make(chan error, 1)
	go func() {
		images := filepath.Join("/run/containerd/io.containerd.runtime.v2.task/k8s.io", c.id, "images")
		for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if to, err := os.Readlink(filepath.Join(images, "mm-1.img")); err == nil && strings.Contains(to, "/"+checkpoint.MappedDir+"/") {
				taken <- os.Remove(filepath.Join(images, "mm-1.img"))
				return
			}
		}
		taken <- errors.New("there was none")
	}()
	if err := errors.Join(c.tryStart(), <-taken); err != nil {
		t.Fatal(err)
	}
	if i, err := p.check(true); err != nil || i.id != src.id {
		t.Fatalf("%+v, %v; events %+v", i, err, events(t, p.config.Metadata.Uid))
	}
	p.wantOutcome(event.Restored, "", "memory is not mapped: a restore with mapped memory failed: ")
	if size, _ := c.mappedBytes(); size != 0 || !c.readByCRIU() {
		t.Errorf("%d MiB are mapped", size>>20)
	}
	archive := filepath.Join(t.TempDir(), "checkpoint.tar")
	if _, err = n.rt.CheckpointContainer(n.ctx(), &cri.CheckpointContainerRequest{ContainerId: c.id, Location: archive, Timeout: 50}); err != nil {
		t.Errorf("checkpoint: %v", err)
	}
	if left, _ := filepath.Glob("/run/containerd/io.containerd.runtime.v2.task/k8s.io/*/images"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	noTmpfsLeft(t)
}

// TestMappedSealed: a privileged container cannot write to what clones have mapped,
// though it may open it.
func TestMappedSealed(t *testing.T) {
	n, name := newNode(t), uniqueKey(t)
	removeTemplate(t, name)
	command := warm(48, 0, "-XX:+UseSerialGC", "-Xmx160m")
	source, src := warmTemplate(t, n, name, command)
	defer source.remove()
	c := mappedClone(t, n, name, src, command, false)
	dir := filepath.Join("/proc", fmt.Sprint(c.pid()), "map_files")
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, e := range names {
		name := filepath.Join(dir, e.Name())
		if target, _ := os.Readlink(name); !strings.HasPrefix(target, "/pages-") {
			continue
		}
		found++
		f, err := os.OpenFile(name, os.O_WRONLY, 0) // as root of the node, which may all else
		if err == nil {
			f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "read-only file system") {
			t.Fatalf("open for writing: %v", err)
		}
	}
	if found == 0 {
		t.Errorf("nothing of %d mappings is of a file of pages", len(names))
	}
}
