"""A small text in many languages and scripts, on which the tokenizers of tiny models are trained.

Written for this purpose. Repetition within a language is wanted: merges are learned from it.
"""

# ruff: noqa: E501, RUF001

from __future__ import annotations

from typing import Final

CORPUS: Final[tuple[str, ...]] = (
    "The river rises in the hills and runs through the old town before it reaches the sea.",
    "In the morning the market opens, and people from the villages bring bread, fruit and fish.",
    "She asked the librarian for the second volume, but the second volume had been lent out.",
    "A stream is a request whose prompt arrives over time; a segment is one piece of its context.",
    "When the last segment has arrived, the answer starts at once, because the prompt was computed.",
    "There are three ways to get there: by train, by bus, or on foot along the river.",
    "He didn't know what they'd say; it's hard to tell, isn't it? We'll see, I'm sure you've heard.",
    "What is the capital of the country? The capital of the country is the largest town.",
    "Read the following document and answer the question that comes after the document.",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 12 15 20 25 50 100 128 256 512 1000 1024 2048 3.14159 99.9%",
    "Dates and times: 2024-01-31 12:30:45, 1999-12-31 23:59:59, 07:05, May 3rd, the 21st century.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\n",
    "for index, value in enumerate(values):\n    if value is None:\n        continue\n",
    '{"name": "stream", "mode": "append", "tokens": [1, 2, 3], "done": false, "next": null}\n',
    "<p class=\"note\">A note &amp; a link: <a href='https://example.org/path?x=1'>here</a></p>\n",
    "| column | value |\n| --- | --- |\n| first | 1 |\n| second | 2 |\n\n- one\n- two\n- three\n",
    "Der Fluss entspringt in den Bergen und fließt durch die alte Stadt, bevor er das Meer erreicht.",
    "Am Morgen öffnet der Markt, und die Leute aus den Dörfern bringen Brot, Obst und Fisch.",
    "Über die Brücke führt der kürzere Weg; für größere Wagen ist die Straße am Ufer besser.",
    "La rivière naît dans les collines et traverse la vieille ville avant d'arriver à la mer.",
    "Le matin, le marché ouvre, et les gens des villages apportent du pain, des fruits, du poisson.",
    "L'élève a reçu la même leçon que les autres élèves, où l'on apprend à lire et à écrire.",
    "El río nace en las colinas y atraviesa la ciudad vieja antes de llegar al mar. ¿Dónde está?",
    "Por la mañana abre el mercado, y la gente de los pueblos trae pan, fruta y pescado. ¡Qué bien!",
    "O rio nasce nas colinas e atravessa a cidade velha antes de chegar ao mar. Não há pão? Há, sim.",
    "Il fiume nasce sulle colline e attraversa la città vecchia prima di arrivare al mare. È così.",
    "Rzeka wypływa ze wzgórz i płynie przez stare miasto, zanim dotrze do morza. Źródło jest czyste.",
    "Řeka pramení v kopcích a protéká starým městem, než dorazí k moři. Příliš žluťoučký kůň.",
    "Nehir tepelerden doğar ve denize ulaşmadan önce eski şehrin içinden geçer. İyi günler, ışık.",
    "Sông bắt nguồn từ những ngọn đồi và chảy qua phố cổ trước khi ra biển. Buổi sáng chợ mở cửa.",
    "Joki saa alkunsa kukkuloilta ja virtaa vanhan kaupungin läpi ennen kuin se saavuttaa meren.",
    "Река берёт начало в холмах и течёт через старый город, прежде чем достигнет моря.",
    "Утром открывается рынок, и люди из деревень приносят хлеб, фрукты и рыбу на рынок.",
    "Річка бере початок у пагорбах і тече через старе місто, перш ніж досягне моря. Їжак і ґанок.",
    "Ο ποταμός πηγάζει από τους λόφους και διασχίζει την παλιά πόλη πριν φτάσει στη θάλασσα.",
    "הנהר נובע מן הגבעות וזורם דרך העיר העתיקה לפני שהוא מגיע אל הים. שָׁלוֹם עולם.",
    "ينبع النهر من التلال ويجري عبر المدينة القديمة قبل أن يصل إلى البحر. السَّلامُ عليكم.",
    "رودخانه از تپه‌ها سرچشمه می‌گیرد و پیش از رسیدن به دریا از شهر کهنه می‌گذرد.",
    "नदी पहाड़ियों से निकलती है और समुद्र तक पहुँचने से पहले पुराने शहर से होकर बहती है।",
    "নদীটি পাহাড় থেকে উঠে পুরনো শহরের মধ্য দিয়ে বয়ে সমুদ্রে পৌঁছায়।",
    "ஆறு மலைகளில் தோன்றி பழைய நகரத்தின் வழியே ஓடிக் கடலை அடைகிறது.",
    "แม่น้ำเกิดจากเนินเขาและไหลผ่านเมืองเก่าก่อนถึงทะเล ตอนเช้าตลาดเปิด",
    "这条河发源于山丘，流过老城，然后流入大海。早上市场开门，村里的人带来面包、水果和鱼。",
    "請先閱讀下面的文件，然後回答文件後面的問題。文件的第一段說明了問題。",
    "川は丘から流れ出し、古い町を通って海に着きます。朝になると市場が開きます。",
    "カタカナとひらがなと漢字をまぜた文です。これはテストのための文です。",
    "강은 언덕에서 시작하여 오래된 도시를 지나 바다에 이릅니다. 아침에 시장이 열립니다.",
    "Emoji and signs: 🙂 🙂 👍 👍🏽 👩‍💻 👨‍👩‍👧 🇩🇪 🇯🇵 ❤️ → ← ≤ ≥ ≠ ∞ √ € £ ¥ © “quoted” ‘single’ — – …",
    "Combining marks: e\u0301 a\u0308 n\u0303 o\u0302 \u212b \ufb01 x\u0304\u0301, tabs\tand  double  spaces   here.",
)
